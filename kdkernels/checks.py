"""Checks of the tensors: bad input raises here, before native code runs."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from kdkernels.divergences import DIVERGENCES, PerRow, Term
from kdkernels.options import MAX_TEMPERATURE, MIN_TEMPERATURE, SHARES, Options, check_is_used
from kdkernels.teachers import Teacher, TopKTeacher, tensors_of

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensors(
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    weight: Tensor | None,
    options: Options,
    tensors: PerRow,
    look: bool = True,
) -> None:
    """Types, dtypes, shapes and devices of one call.

    ``look``: at the values of CPU tensors as well, which a compiler that traces the call has not.

    Raises:
        TypeError, ValueError: naming the tensor or the options that are wrong.
    """
    _check_kind("student_logits", student)
    shape, device = student.shape, student.device
    if not shape or shape[-1] == 0:
        raise ValueError(
            f"student_logits must be (..., C) with C >= 1 classes last, got {tuple(shape)}"
        )
    classes = options.num_classes or shape[-1]
    if classes > shape[-1]:
        raise ValueError(
            f"num_classes must be at most the classes of student_logits, {shape[-1]}, got {classes}"
        )
    _check_teacher(teacher, student, options, tensors, classes, look)
    if labels is not None:
        _check_labels(labels, shape[:-1])
        if labels.device != device:
            _wrong_device("labels", labels, student)
    elif options.alpha < 1:
        raise ValueError(f"labels are missing: alpha must be 1 without them, got {options.alpha}")
    else:
        for term in options.divergence:
            if DIVERGENCES[term.name].labelled:
                raise ValueError(f"labels are missing: divergence={term.name!r} needs them")
    if weight is not None:
        check_weight(weight)
        if options.z_loss:
            raise ValueError("z_loss and weight do not go together")
        _check_of_classes("weight", weight, classes, student)
    for name in ("temperature", "sample_weight"):
        if name in tensors and options.intra_class > 0:
            raise ValueError(f"dist_gamma and {name} per row do not go together")
    for name, values in tensors.items():
        if name.endswith("_bias"):
            _check_kind("logit_bias", values, "a Tensor or None")
            _check_constant("logit_bias", values)
            _check_of_classes("logit_bias", values, classes, student)
        elif name != "num_items":  # which means.py has made
            _check_per_row(name, values, options.divergence, student)
            if look and values.device.type == "cpu":  # elsewhere the host would wait
                _check_values(name, values)


def _check_teacher(
    teacher: Any, student: Tensor, options: Options, tensors: PerRow, classes: int, look: bool
) -> None:
    if isinstance(teacher, TopKTeacher):
        _check_top_k(teacher, student, options, tensors)
        if look and student.device.type == "cpu":
            _check_entries(teacher, classes)
        return None
    several = isinstance(teacher, tuple)
    for k, t in enumerate(teacher) if several else [(0, teacher)]:
        name = f"teacher_logits[{k}]" if several else "teacher_logits"
        _check_kind(name, t)
        wanted: tuple[int, ...] = student.shape
        if options.num_classes is not None and t.dim() and t.shape[-1] >= classes:
            wanted = (*student.shape[:-1], t.shape[-1])
        if t.shape != wanted:
            hint = ""
            if t.shape[:-1] == student.shape[:-1] and options.num_classes is None:
                hint = "; num_classes says how many classes the two have in common"
            elif options.num_classes is not None:
                hint = f"; num_classes is {classes}"
            raise ValueError(
                f"{name} must have the shape of student_logits, {tuple(student.shape)}, "
                f"got {tuple(t.shape)}{hint}"
            )
        if t.device != student.device:
            _wrong_device(name, t, student)
    if several and not teacher:
        raise ValueError("teacher_logits must hold at least one teacher, got none")
    if options.teacher_weights:
        count = len(teacher) if several else 1
        if len(options.teacher_weights) != count:
            raise ValueError(
                f"teacher_weights must hold one weight per teacher, {count}, "
                f"got {len(options.teacher_weights)}"
            )
    return None


def _check_top_k(teacher: TopKTeacher, student: Tensor, options: Options, tensors: PerRow) -> None:
    if teacher.values.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"TopKTeacher must have the rows of student_logits, {tuple(student.shape[:-1])}, "
            f"got {tuple(teacher.values.shape[:-1])}"
        )
    if teacher.values.device != student.device:
        _wrong_device("TopKTeacher.values", teacher.values, student)
    k, classes = teacher.values.shape[-1], options.num_classes or student.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"TopKTeacher must have 1 to C = {classes} entries a row, got {k}")
    names = [term.name for term in options.divergence]
    refused = {
        "standardize": options.standardize,
        "taid": options.taid is not None,
        "logit_scale of the teacher": options.teacher_scale != 1,
        "logit_bias of the teacher": "teacher_bias" in tensors,
        "entropy_gap": options.entropy_gap != 0,
        "dist_gamma": options.intra_class > 0,
        "teacher_weights": bool(options.teacher_weights),
    }
    refused |= {f"divergence={n!r}": n in ("dist", *_LABELLED) for n in names}
    tail = f"TopKTeacher(tail={teacher.tail!r})"
    if teacher.tail != "renormalize":
        refused["several temperatures"] = bool(options.temperatures)
        refused["agreement"] = options.agreement != 0
        refused["divergence='hard'"] = "hard" in names
        refused['return_terms="metrics"'] = options.metrics
        wanted = options.teacher_temperature or options.temperature
        if teacher.temperature != wanted:
            raise ValueError(
                f"{tail} needs log-probabilities taken at the temperature in use, {wanted}, and "
                f"its temperature is {teacher.temperature}"
            )
    for option, asked in refused.items():
        if asked:
            raise ValueError(f"{tail} and {option} do not go together")


def _check_entries(teacher: TopKTeacher, classes: int) -> None:
    _check_indices(teacher.indices, classes)
    if teacher.tail != "renormalize" and teacher.values.numel():
        total = teacher.values.double().logsumexp(-1).max().item()
        if total > 1e-2:
            raise ValueError(
                f"TopKTeacher(tail={teacher.tail!r}) needs log-probabilities, and those of a row "
                f"add up to a probability of {min(total, 700.0):.4g} on a logarithmic scale"
            )


_LABELLED = tuple(name for name, d in DIVERGENCES.items() if d.labelled)


def _check_indices(indices: Tensor, classes: int) -> None:
    if not indices.numel():
        return
    rows = indices.reshape(-1, indices.shape[-1])
    out_of_range = (rows < 0) | (rows >= classes)
    if bool(out_of_range.any()):
        row, entry = out_of_range.nonzero()[0].tolist()
        raise IndexError(
            f"TopKTeacher.indices of row {row} hold {int(rows[row, entry])}: expected "
            f"0 <= index < {classes}"
        )
    ordered = rows.sort(-1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if bool(repeated.any()):
        row, entry = repeated.nonzero()[0].tolist()
        raise ValueError(
            f"TopKTeacher.indices of row {row} hold {int(ordered[row, entry])} more than once"
        )


def _check_per_row(option: str, values: Any, mixture: tuple[Term, ...], student: Tensor) -> None:
    """One number for each row."""
    if option == "dkd":
        raise ValueError("the weight of 'dkd' in divergence must be a number, not one per row")
    if option in SHARES:
        check_is_used(option, mixture)
    name = _named(option)
    _check_kind(name, values)
    if option != "temperature":
        _check_constant(name, values)
    shape = student.shape[:-1]
    if values.shape != shape and not (option == "temperature" and values.dim() == 0):
        raise ValueError(
            f"{name} must hold one value per row, shape {tuple(shape)}, got {tuple(values.shape)}"
        )
    if values.device != student.device:
        _wrong_device(name, values, student)


def _named(option: str) -> str:
    return f"the weight of {option!r} in divergence" if option in DIVERGENCES else option


def _check_values(option: str, values: Tensor) -> None:
    name = _named(option)
    allowed = {"temperature": (MIN_TEMPERATURE, MAX_TEMPERATURE), "sample_weight": (0.0, 1e30)}
    if option in SHARES or option in allowed:
        least, most = allowed.get(option, (0.0, 1.0))
        if not bool(((values >= least) & (values <= most)).all()):
            bounds = "finite and >= 0" if option == "sample_weight" else f"in [{least:g}, {most:g}]"
            raise ValueError(f"{name} must be {bounds} in every row")
    elif not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite in every row")


def _check_constant(name: str, values: Tensor) -> None:
    if values.requires_grad:
        raise ValueError(f"{name} must not require grad: it is a constant of the loss")


def _check_of_classes(name: str, values: Tensor, classes: int, student: Tensor) -> None:
    if values.shape != (classes,):
        raise ValueError(
            f"{name} must hold one value per class, shape ({classes},), got {tuple(values.shape)}"
        )
    if values.device != student.device:
        _wrong_device(name, values, student)


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
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    weight: Tensor | None,
    tensors: PerRow,
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
    others = [("teacher_logits", t) for t in tensors_of(teacher)] + list(tensors.items())
    for name, other in (*others, ("labels", labels), ("weight", weight)):
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
