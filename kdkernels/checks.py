"""Argument checks: bad input raises here, before native code runs, and nothing has been changed."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.divergences import DIVERGENCES, FORWARD_KL, PerRow, Term

# Beyond these T² and 1/T leave the numbers that float32 logits can be divided by.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
# Of the options that belong to one divergence or another.
DEFAULTS = {"beta": 0.5, "skew": 0.1, "divergence_alpha": 0.5, "dkd_alpha": 1.0, "dkd_beta": 8.0}
REDUCTIONS = ("mean", "sum", "none")
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Options(NamedTuple):
    """The checked options of one loss: all that does not change from call to call."""

    temperature: float
    alpha: float
    ignore_index: int
    label_smoothing: float
    reduction: str
    distill_ignored: bool
    divergence: tuple[Term, ...] = FORWARD_KL
    teacher_temperature: float | None = None  # None: the same as the student's
    scale_by_t2: bool = True

    @property
    def unusual(self) -> str | None:
        """What is not the forward KL at one temperature times T², in words; None if nothing is."""
        if self.divergence != FORWARD_KL:
            return f"divergence {' + '.join(term.name for term in self.divergence)}"
        if self.teacher_temperature is not None:
            return "a teacher_temperature of its own"
        return None if self.scale_by_t2 else "scale_by_t2=False"


def _number(name: str, value: Any, expected: str) -> float:
    # bool is an int to Python; a tensor would make the GPU wait for the host.
    if not isinstance(value, (bool, Tensor)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, OverflowError):  # an array of several numbers; 10**400
            pass
    raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def _temperature(name: str, value: Any) -> float:
    temperature = _number(name, value, "a finite number > 0")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{name} must be a finite number > 0, got {temperature}")
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"{name} must be between {MIN_TEMPERATURE} and {MAX_TEMPERATURE}, got {temperature}"
        )
    return temperature


def _share(name: str, value: Any) -> float:
    share = _number(name, value, "a number in [0, 1]")
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {share}")
    return share


def _mixture(divergence: Any, parameters: dict[str, float]) -> tuple[Term, ...]:
    """The terms of a name, or of a mapping of names to weights (as its items)."""
    known = f"one of {tuple(DIVERGENCES)} or a mapping of these to weights"
    if isinstance(divergence, str):
        divergence = ((divergence, 1.0),)
    pairs = isinstance(divergence, tuple) and all(isinstance(item, tuple) for item in divergence)
    if not pairs:
        raise TypeError(f"divergence must be {known}, got {type(divergence).__name__}")
    if not divergence:
        raise ValueError("divergence must name at least one divergence, got an empty mapping")
    terms = []
    for name, weight in divergence:
        if name not in DIVERGENCES:
            raise ValueError(f"divergence must be {known}, got {name!r}")
        weight = _number(f"the weight of {name!r} in divergence", weight, "a finite number")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} in divergence must be finite, got {weight}")
        option = DIVERGENCES[name].option
        parameter = 0.0 if option is None else parameters[option]
        if option == "divergence_alpha" and not math.isfinite(parameter):
            raise ValueError(f"divergence_alpha must be finite, got {parameter}")
        if name == "renyi" and not parameter > 0:
            raise ValueError(f"divergence_alpha must be > 0 with 'renyi', got {parameter}")
        terms.append(Term(name, weight, parameter, parameters["dkd_beta"] if name == "dkd" else 0))
    terms.sort(key=lambda term: term.name != "dkd")
    return tuple(terms)


def _check_dkd(mixture: tuple[Term, ...], **others: bool) -> None:
    """What decoupled distillation does not go together with, and its own weights."""
    for name, value in (("dkd_alpha", mixture[0].parameter), ("dkd_beta", mixture[0].second)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    if len(mixture) > 1:
        raise ValueError(
            f"divergence 'dkd' and {mixture[1].name!r} cannot be mixed in one pass; add two losses"
        )
    for option, asked in others.items():
        if asked:
            raise ValueError(f"divergence='dkd' and {option} do not go together")


def _check_is_used(option: str, mixture: tuple[Term, ...]) -> None:
    """No option is taken and then ignored."""
    users = [n for n, d in DIVERGENCES.items() if option in (d.option, d.second)]
    if not any(term.name in users for term in mixture):
        asked = " + ".join(repr(term.name) for term in mixture)
        raise ValueError(
            f"{option} is for divergence {' or '.join(map(repr, users))}, and divergence is {asked}"
        )


def check_per_row(per_row: PerRow, mixture: tuple[Term, ...], student: Tensor) -> None:
    """Options given per row: one finite number for each, beta and skew in [0, 1].

    Raises:
        TypeError, ValueError: naming the option that is wrong. Values are looked at on the CPU;
            elsewhere that would make the host wait.
    """
    for option, values in per_row.items():
        if option == "dkd":
            raise ValueError("the weight of 'dkd' in divergence must be a number, not one per row")
        if option in DEFAULTS:
            _check_is_used(option, mixture)
        name = option if option in DEFAULTS else f"the weight of {option!r} in divergence"
        _check_kind(name, values)
        if values.requires_grad:
            raise ValueError(f"{name} must not require grad: it is a constant of the loss")
        if values.shape != student.shape[:-1]:
            raise ValueError(
                f"{name} must hold one value per row, shape {tuple(student.shape[:-1])}, "
                f"got {tuple(values.shape)}"
            )
        if values.device != student.device:
            _wrong_device(name, values, student)
        if values.device.type != "cpu":
            continue
        if option in DEFAULTS:
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise ValueError(f"{name} must be in [0, 1] in every row")
        elif not bool(values.isfinite().all()):
            raise ValueError(f"{name} must be finite in every row")


def _check_options(
    temperature: Any,
    alpha: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    distill_ignored: Any,
    inplace: Any,
    return_terms: Any,
    backend: Any,
    divergence: Any,
    beta: Any,
    skew: Any,
    divergence_alpha: Any,
    teacher_temperature: Any,
    scale_by_t2: Any,
    dkd_alpha: Any,
    dkd_beta: Any,
) -> Options:
    temperature = _temperature("temperature", temperature)
    if teacher_temperature is not None:
        teacher_temperature = _temperature("teacher_temperature", teacher_temperature)
    if teacher_temperature == temperature:
        teacher_temperature = None
    alpha = _share("alpha", alpha)
    label_smoothing = _share("label_smoothing", label_smoothing)
    parameters = {
        "beta": _share("beta", beta),
        "skew": _share("skew", skew),
        "divergence_alpha": _number("divergence_alpha", divergence_alpha, "a finite number"),
        "dkd_alpha": _number("dkd_alpha", dkd_alpha, "a number >= 0"),
        "dkd_beta": _number("dkd_beta", dkd_beta, "a number >= 0"),
    }
    mixture = _mixture(divergence, parameters)
    for option, value in parameters.items():
        if value != DEFAULTS[option]:
            _check_is_used(option, mixture)
    if mixture[0].name == "dkd":
        _check_dkd(
            mixture,
            label_smoothing=label_smoothing > 0,
            distill_ignored=distill_ignored is True,
            teacher_temperature=teacher_temperature is not None,
        )
    if isinstance(ignore_index, (bool, Tensor)) or not hasattr(ignore_index, "__index__"):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, got {ignore_index}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    switches = {
        "distill_ignored": distill_ignored,
        "inplace": inplace,
        "return_terms": return_terms,
        "scale_by_t2": scale_by_t2,
    }
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend must be None or one of {backends.NAMES}, got {backend!r}")
    return Options(
        temperature,
        alpha,
        int(ignore_index),
        label_smoothing,
        reduction,
        distill_ignored,
        mixture,
        teacher_temperature,
        scale_by_t2,
    )


_cached_check_options = functools.lru_cache(maxsize=256, typed=True)(_check_options)


def check_options(*options: Any) -> Options:
    """The options, in the order of ``kd_loss``'s signature without ``weight``, as :class:`Options`.

    A mapping of divergences as the tuple of its items, as ``split_per_row`` makes it.

    Raises:
        TypeError, ValueError: naming the option that is wrong.
    """
    try:
        return _cached_check_options(*options)
    except TypeError:  # an unhashable value, or one of the wrong type: let the check name it
        return _check_options(*options)


def check_tensors(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    options: Options,
) -> None:
    """Types, dtypes, shapes and devices of one call.

    Raises:
        TypeError, ValueError: naming the tensor that is wrong.
    """
    _check_kind("student_logits", student)
    _check_kind("teacher_logits", teacher)
    shape, device = student.shape, student.device
    if shape != teacher.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {tuple(shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    if not shape or shape[-1] == 0:
        raise ValueError(
            f"student_logits must be (..., C) with C >= 1 classes last, got {tuple(shape)}"
        )
    if teacher.device != device:
        _wrong_device("teacher_logits", teacher, student)
    if labels is not None:
        _check_labels(labels, shape[:-1])
        if labels.device != device:
            _wrong_device("labels", labels, student)
    elif options.alpha < 1:
        raise ValueError(f"labels are missing: alpha must be 1 without them, got {options.alpha}")
    elif options.divergence[0].name == "dkd":
        raise ValueError("labels are missing: divergence='dkd' needs them")
    if weight is not None:
        check_weight(weight)
        if weight.shape != shape[-1:]:
            raise ValueError(
                f"weight must hold one value per class, shape ({shape[-1]},), "
                f"got {tuple(weight.shape)}"
            )
        if weight.device != device:
            _wrong_device("weight", weight, student)


def check_weight(weight: Tensor) -> None:
    """What can be said of class weights before the logits are known."""
    _check_kind("weight", weight, "a Tensor or None")
    if weight.requires_grad:
        raise ValueError("weight must not require grad: class weights are constants of the loss")


def _check_kind(name: str, tensor: Any, expected: str = "a Tensor") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {expected}, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided (dense) Tensor, got {tensor.layout}")


def _check_labels(labels: Any, shape: torch.Size) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a Tensor or None, got {type(labels).__name__}")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"labels must be integers (int64, int32, int16, int8 or uint8), got {labels.dtype}"
        )
    if labels.layout is not torch.strided:
        raise TypeError(f"labels must be a strided (dense) Tensor, got {labels.layout}")
    if labels.shape != shape:
        raise ValueError(
            f"labels must have the shape of the logits without the class dimension, "
            f"{tuple(shape)}, got {tuple(labels.shape)}"
        )


def _wrong_device(name: str, tensor: Tensor, student: Tensor) -> NoReturn:
    raise ValueError(
        f"{name} must be on the device of student_logits, {student.device}, got {tensor.device}"
    )


def check_inplace(
    student: Tensor, teacher: Tensor, labels: Tensor | None, weight: Tensor | None
) -> None:
    """inplace=True destroys the logits: refuse before anything is written where that is wrong.

    Raises:
        ValueError: saying what else would be overwritten.
    """
    # A view of a parameter is not a leaf itself; its base is.
    base = student._base
    written = (student,) if base is None else (student, base)
    if torch.is_grad_enabled() and any(t.is_leaf and t.requires_grad for t in written):
        raise ValueError(
            "inplace=True would overwrite student_logits, a leaf that requires grad or a view of "
            "one; it is meant for logits that a model computed"
        )
    if torch.is_grad_enabled() and student.requires_grad and _is_protected_view(student):
        raise ValueError(
            "inplace=True cannot write to student_logits, one of several views that one operation "
            "returned (split, chunk, unbind) or a view made under no_grad: take a slice instead"
        )
    if any(size > 1 and stride < span for size, stride, span in _dims_with_spans(student)):
        raise ValueError(
            f"inplace=True needs student_logits whose elements do not overlap, got strides "
            f"{student.stride()} for shape {tuple(student.shape)}"
        )
    first, last = _byte_range(student)
    for name, other in (("teacher_logits", teacher), ("labels", labels), ("weight", weight)):
        if other is None or not (student.numel() and other.numel()):
            continue
        other_first, other_last = _byte_range(other)
        if first and first < other_last and other_first < last:
            raise ValueError(
                f"inplace=True needs {name} outside the memory that student_logits span, as that "
                "is overwritten"
            )


def _is_protected_view(t: Tensor) -> bool:
    """Whether autograd lets nobody write to this view; false if torch no longer tells."""
    creation_meta = getattr(torch._C._autograd, "_get_creation_meta", None)
    if creation_meta is None or not t._is_view():
        return False
    return bool(creation_meta(t) != torch._C._autograd.CreationMeta.DEFAULT)


def _dims_with_spans(t: Tensor) -> list[tuple[int, int, int]]:
    """(size, stride, elements spanned by all the smaller strides) of each dimension."""
    dims, span = [], 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        dims.append((size, stride, span))
        span += (size - 1) * stride
    return dims


def _byte_range(t: Tensor) -> tuple[int, int]:
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + extent * t.element_size()
