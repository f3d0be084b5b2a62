"""``kd_loss``: argument checks, choice of backend and the ``torch.autograd.Function``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.reference import KDTerms, kd_terms

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


def _number(name: str, value: Any, expected: str) -> float:
    # bool is an int to Python; a tensor would make the GPU wait for the host.
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return float(value)


def _check_options(
    temperature: Any,
    alpha: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    backend: Any = None,
    distill_ignored: Any = False,
) -> Options:
    temperature = _number("temperature", temperature, "a finite number > 0")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    alpha = _number("alpha", alpha, "a number in [0, 1]")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    label_smoothing = _number("label_smoothing", label_smoothing, "a number in [0, 1]")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if isinstance(ignore_index, bool) or not hasattr(ignore_index, "__index__"):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend must be None or one of {backends.NAMES}, got {backend!r}")
    return Options(
        temperature, alpha, int(ignore_index), label_smoothing, reduction, bool(distill_ignored)
    )


_cached_check_options = functools.lru_cache(maxsize=256, typed=True)(_check_options)


def check_options(*options: Any) -> Options:
    """The options as :class:`Options`; TypeError or ValueError names the one that is wrong."""
    try:
        return _cached_check_options(*options)
    except TypeError:  # an unhashable value, or one of the wrong type: let the check name it
        return _check_options(*options)


def _check_tensors(
    student: Tensor, teacher: Tensor, labels: Tensor | None, weight: Tensor | None, alpha: float
) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(logits).__name__}")
        if not logits.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {logits.dtype}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(
            f"student_logits must be (..., C) with C >= 1 classes last, got {tuple(student.shape)}"
        )
    if teacher.device != student.device:
        _wrong_device("teacher_logits", teacher, student)
    if labels is None:
        if alpha < 1:
            raise ValueError(f"labels are missing: alpha must be 1 without them, got {alpha}")
    elif not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a Tensor or None, got {type(labels).__name__}")
    elif labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    elif labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of the logits without the class dimension, "
            f"{tuple(student.shape[:-1])}, got {tuple(labels.shape)}"
        )
    elif labels.device != student.device:
        _wrong_device("labels", labels, student)
    if weight is not None:
        _check_weight(weight, student)


def _check_weight(weight: Tensor, student: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor or None, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.shape != student.shape[-1:]:
        raise ValueError(
            f"weight must hold one value per class, shape ({student.shape[-1]},), "
            f"got {tuple(weight.shape)}"
        )
    if weight.device != student.device:
        _wrong_device("weight", weight, student)
    if weight.requires_grad:
        raise ValueError("weight must not require grad: class weights are constants of the loss")


def _wrong_device(name: str, tensor: Tensor, student: Tensor) -> NoReturn:
    raise ValueError(
        f"{name} must be on the device of student_logits, {student.device}, got {tensor.device}"
    )


def _check_inplace(student: Tensor, teacher: Tensor) -> None:
    """inplace=True destroys the logits: refuse before anything is written where that is wrong."""
    if student.is_leaf and student.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "inplace=True would overwrite student_logits, a leaf that requires grad; "
            "it is meant for logits that a model computed"
        )
    if any(size > 1 and stride < span for size, stride, span in _dims_with_spans(student)):
        raise ValueError(
            f"inplace=True needs student_logits whose elements do not overlap, got strides "
            f"{student.stride()} for shape {tuple(student.shape)}"
        )
    first, last = _byte_range(student)
    teacher_first, teacher_last = _byte_range(teacher)
    if student.numel() and first < teacher_last and teacher_first < last:
        raise ValueError(
            "inplace=True needs teacher_logits that share no memory with "
            "student_logits, which are overwritten"
        )


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


class _FusedKDLoss(torch.autograd.Function):
    """The gradient is made in the forward; the backward hands it over, scaled if need be."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        weight: Tensor | None,
        options: Options,
        backend: backends.Backend,
        inplace: bool,
        want_terms: bool,
    ) -> tuple[Tensor | None, ...]:
        result = backend.run(student, teacher, labels, weight, options, want_terms, True, inplace)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend, ctx.inplace = options, backend, inplace
        ctx.grad, ctx.grad_scale = result.grad, result.grad_scale
        if not inplace:
            ctx.save_for_backward(student, teacher, labels, weight)  # for a second derivative only
        if want_terms:
            ctx.mark_non_differentiable(result.soft, result.hard)
        if inplace:
            if student._is_view():
                # autograd takes no view among several outputs; the version counter still tells
                # every node that saved these logits.
                torch.autograd.graph.increment_version(student)
            else:
                ctx.mark_dirty(student)
                ctx.version = student._version + 1
                return result.loss, result.soft, result.hard, student
            ctx.version = student._version
        return result.loss, result.soft, result.hard, None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        incoming, overwritten = grads[0], grads[3]
        if overwritten is not None:
            raise RuntimeError(
                "student_logits were used again after inplace=True had overwritten them with "
                "their gradient; use inplace=False, or compute the other loss first"
            )
        if incoming is None:
            grad = None
        elif torch.is_grad_enabled():
            grad = _differentiable_gradient(ctx, incoming)
        else:
            grad = _take_gradient(ctx, incoming)
        return grad, None, None, None, None, None, None, None


def _take_gradient(ctx: Any, incoming: Tensor) -> Tensor:
    grad: Tensor | None = ctx.grad
    if grad is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the gradient was handed over. "
            "Specify retain_graph=True for the first backward."
        )
    if ctx.inplace and grad._version != ctx.version:
        raise RuntimeError(
            "student_logits hold their gradient (inplace=True) and were modified since; "
            "the gradient is lost"
        )
    if _graph_is_kept():
        grad = grad.clone()  # what is handed over may be modified by whoever receives it
    else:
        ctx.grad = None
    return ctx.backend.scale(grad, incoming, ctx.grad_scale)  # type: ignore[no-any-return]


def _always() -> bool:
    return True


# Whether the backward under way runs with retain_graph=True. torch has no public name for it; one
# that drops this name costs a copy per backward, not the result.
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", _always
)


def _differentiable_gradient(ctx: Any, incoming: Tensor) -> Tensor:
    """The gradient under create_graph=True, by the reference, which can be differentiated."""
    if ctx.inplace:
        raise RuntimeError(
            "inplace=True overwrote student_logits: no second derivative (create_graph=True)"
        )
    student, teacher, labels, weight = ctx.saved_tensors
    loss = kd_terms(student, teacher, labels, weight=weight, **ctx.options._asdict()).loss
    (grad,) = torch.autograd.grad(loss, student, incoming, create_graph=True)
    return grad  # type: ignore[no-any-return]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    distill_ignored: bool = False,
    inplace: bool = False,
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | KDTerms:
    """Knowledge-distillation loss ``alpha · T² · KL(p ‖ q) + (1 - alpha) · CE(r, y)`` in one pass.

    With student logits s and teacher logits t: p = softmax(t/T), q = softmax(s/T), r = softmax(s)
    (Hinton, Vinyals and Dean 2015, arXiv:1503.02531). KL is summed over the classes. Its mean is
    over the rows that are not ignored, and the cross entropy is
    :func:`torch.nn.functional.cross_entropy`'s, weighted mean and label smoothing included; a batch
    with nothing active is 0. The teacher is a constant. Inputs are not modified.

    Args:
        student_logits: (..., C), float32, bfloat16, float16 or float64. The rows may be strided;
            they are copied only if neighbouring classes are not neighbours in memory.
        teacher_logits: (..., C), any of these dtypes, on the same device.
        labels: (...), integers in [0, C) or ``ignore_index``; None needs ``alpha=1``.
        temperature: T > 0, dividing both logits. Default 4.0.
        alpha: share of the distillation term in [0, 1]. Default 0.9. A term whose share is 0 is
            no part of the loss, whatever its value.
        ignore_index: label of rows that contribute nothing, even if they hold NaN. Default -100.
        label_smoothing: in [0, 1], of the cross entropy. Default 0.0.
        weight: class weights of the cross entropy, (C,), no gradient. Default None.
        reduction: ``"mean"`` (default), ``"sum"``, or ``"none"`` for one loss per row.
        distill_ignored: the soft term covers ignored rows too: unlabelled images. Default False.
        inplace: write the gradient over ``student_logits`` and save its memory; the logits are
            lost, and autograd told so. Default False.
        return_terms: return ``KDTerms(loss, soft, hard)``, the terms detached. Default False.
        backend: None (the best that can run), ``"cpu"`` or ``"reference"``;
            ``python -m kdkernels info`` lists what is available.

    Returns:
        The loss, a scalar or (...) with ``reduction="none"``: float32, or float64 for float64
        student logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, value, shape or device; it is named.
        IndexError: a label outside [0, C) that is not ``ignore_index``.
        RuntimeError: the named backend cannot run here, and why.
    """
    options = check_options(
        temperature, alpha, ignore_index, label_smoothing, reduction, backend, distill_ignored
    )
    _check_tensors(student_logits, teacher_logits, labels, weight, options.alpha)
    needs_grad = student_logits.requires_grad and torch.is_grad_enabled()
    chosen = backends.select(
        backend, student_logits.device.type, student_logits.dtype, teacher_logits.dtype
    )
    if inplace:
        _check_inplace(student_logits, teacher_logits)
    if needs_grad and (chosen.name != "reference" or inplace):
        loss, soft, hard, _ = _FusedKDLoss.apply(
            student_logits, teacher_logits, labels, weight, options, chosen, inplace, return_terms
        )
        return KDTerms(loss, soft, hard) if return_terms else loss
    loss, soft, hard, *_ = chosen.run(
        student_logits, teacher_logits, labels, weight, options, return_terms, False, False
    )
    return KDTerms(loss, soft, hard) if return_terms else loss  # type: ignore[arg-type]
