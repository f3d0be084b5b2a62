"""``kd_loss``: choice of backend and the ``torch.autograd.Function``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdkernels import backends
from kdkernels.checks import (
    Options,
    check_inplace,
    check_options,
    check_per_row,
    check_tensors,
)
from kdkernels.divergences import PerRow, split_per_row
from kdkernels.reference import KDTerms, kd_terms


class _Call(NamedTuple):
    """What one call of the loss is asked to do, beside the student logits.

    In one object, as autograd charges for each argument; and it does not see these tensors, which
    have no gradient and of which it could not save those made in inference mode.
    """

    teacher: Tensor
    labels: Tensor | None
    weight: Tensor | None
    options: Options
    backend: backends.Backend
    inplace: bool
    want_terms: bool
    per_row: PerRow

    def versions(self) -> list[int]:
        """What in-place writes have counted up to; writes to inference tensors are not counted."""
        constants = [t for t in (self.teacher, self.labels, self.weight) if t is not None]
        constants += self.per_row.values()
        try:
            return [t._version for t in constants]
        except RuntimeError:  # inference tensors have none; asking each of them takes longer
            return [t._version for t in constants if not t.is_inference()]


class _FusedKDLoss(torch.autograd.Function):
    """The gradient is made in the forward; the backward hands it over, scaled if need be."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: _Call) -> Tensor | tuple[Tensor | None, ...]:  # type: ignore[override]
        teacher, labels, weight, options, backend, inplace, want_terms, per_row = call
        loss, soft, hard, grad, grad_scale = backend.run(
            student, teacher, labels, weight, options, want_terms, True, inplace, per_row
        )
        ctx.call, ctx.grad, ctx.grad_scale = call, grad, grad_scale
        if inplace:
            ctx.version = student._version + 1  # one more by _Overwritten
        else:  # for a second derivative
            ctx.save_for_backward(student)
            ctx.versions = call.versions()
        if not want_terms:
            return loss
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(soft, hard)
        return loss, soft, hard

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, *_: None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if incoming is None:
            return None, None
        if torch.is_grad_enabled():
            return _differentiable_gradient(ctx, incoming), None
        return _take_gradient(ctx, incoming), None


class _Overwritten(torch.autograd.Function):
    """Tells autograd that the logits hold their gradient now: whoever uses them next gets an error.

    A function of its own, after the loss has tied itself to what the logits were, because autograd
    takes a view that is written to only as the single output.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(student)
        return student

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:  # type: ignore[override]
        raise RuntimeError(
            "student_logits were used again after inplace=True had overwritten them with "
            "their gradient; use inplace=False, or compute the other loss first"
        )


def _call_of(ctx: Any) -> _Call:
    if ctx.call is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the gradient was handed over. "
            "Specify retain_graph=True for the first backward."
        )
    return ctx.call  # type: ignore[no-any-return]


def _take_gradient(ctx: Any, incoming: Tensor) -> Tensor:
    call, grad = _call_of(ctx), ctx.grad
    if call.inplace and grad._version != ctx.version:
        raise RuntimeError(
            "student_logits hold their gradient (inplace=True) and were modified since; "
            "the gradient is lost"
        )
    if _graph_is_kept():
        grad = grad.clone()  # what is handed over may be modified by whoever receives it
    else:
        ctx.grad = ctx.call = None
    return call.backend.scale(grad, incoming, ctx.grad_scale)


def _always() -> bool:
    return True


# Whether the backward under way runs with retain_graph=True. torch has no public name for it; one
# that drops this name costs a copy per backward, not the result.
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", _always
)


def _differentiable_gradient(ctx: Any, incoming: Tensor) -> Tensor:
    """The gradient under create_graph=True, by the reference, which can be differentiated."""
    call = _call_of(ctx)
    if call.inplace:
        raise RuntimeError(
            "inplace=True overwrote student_logits: no second derivative (create_graph=True)"
        )
    (student,) = ctx.saved_tensors
    if call.versions() != ctx.versions:
        raise RuntimeError(
            "teacher_logits, labels or weight have been modified by an inplace operation since the "
            "loss was computed: no second derivative (create_graph=True)"
        )
    # Through an alias: the hooks of the logits are for this gradient alone, and run once.
    alias = student.view_as(student)
    loss = kd_terms(
        alias,
        call.teacher,
        call.labels,
        weight=call.weight,
        per_row=call.per_row,
        **call.options._asdict(),
    ).loss
    (grad,) = torch.autograd.grad(loss, alias, incoming, create_graph=True)
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
    divergence: str | Mapping[str, float | Tensor] = "forward_kl",
    beta: float | Tensor = 0.5,
    skew: float | Tensor = 0.1,
    divergence_alpha: float = 0.5,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    dkd_alpha: float = 1.0,
    dkd_beta: float = 8.0,
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
        temperature: T > 0, dividing both logits; from 1e-6 to 1e6. Default 4.0.
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
        backend: None (the best that can run), ``"cpu"``, ``"cuda"``, ``"triton"`` or
            ``"reference"``; ``python -m kdkernels info`` lists what is available.
        divergence: what stands in the place of KL(p ‖ q), by default ``"forward_kl"``:
            ``"reverse_kl"`` KL(q ‖ p); ``"jsd"`` β KL(p ‖ m) + (1 - β) KL(q ‖ m) with
            m = β p + (1 - β) q, which at β = 0 and 1 is forward and reverse KL (GKD,
            arXiv:2306.13649); ``"skew_forward_kl"`` KL(p ‖ λ p + (1 - λ) q) and
            ``"skew_reverse_kl"`` KL(q ‖ λ q + (1 - λ) p) (DistiLLM, arXiv:2402.03898);
            ``"total_variation"`` ½ Σ|p - q|; ``"alpha"`` (Σ p^a q^(1-a) - 1) / (a (a - 1));
            ``"renyi"`` log(Σ p^a q^(1-a)) / (a - 1); ``"dkd"`` decoupled distillation (DKD,
            arXiv:2203.08679), dkd_alpha times the binary divergence between the label and all else
            and dkd_beta times the divergence among all else; or a mapping of such names to weights,
            numbers or one per row (...), for their weighted sum in the same pass.
        beta: β of ``"jsd"`` in [0, 1], or one per row (...). Default 0.5.
        skew: λ of the skewed divergences in [0, 1], or one per row (...). Default 0.1.
        divergence_alpha: a of ``"alpha"`` (any number; 1 and 0 are forward and reverse KL) and
            ``"renyi"`` (> 0). Default 0.5.
        teacher_temperature: divides the teacher logits. Default: ``temperature``.
        scale_by_t2: multiply the divergence by T², so that its gradient does not shrink with the
            temperature. Default True.
        dkd_alpha, dkd_beta: weights >= 0 of the two parts of ``"dkd"``. Default 1.0, 8.0.

    Returns:
        The loss, a scalar or (...) with ``reduction="none"``: float32, or float64 for float64
        student logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, value, shape or device; it is named.
        IndexError: a label outside [0, C) that is not ``ignore_index``, for CPU tensors. Elsewhere
            looking at labels would make the device wait: the row's loss is NaN, unless the
            environment variable ``KDKERNELS_CHECK_LABELS=1`` asks for the check.
        RuntimeError: the named backend cannot run here, and why.
    """
    per_row: PerRow = {}
    if not (isinstance(divergence, str) and isinstance(beta, float) and isinstance(skew, float)):
        divergence, beta, skew, per_row = split_per_row(divergence, beta, skew)
    options = check_options(
        temperature,
        alpha,
        ignore_index,
        label_smoothing,
        reduction,
        distill_ignored,
        inplace,
        return_terms,
        backend,
        divergence,
        beta,
        skew,
        divergence_alpha,
        teacher_temperature,
        scale_by_t2,
        dkd_alpha,
        dkd_beta,
    )
    return checked_loss(
        student_logits,
        teacher_logits,
        labels,
        weight,
        options,
        inplace,
        return_terms,
        backend,
        per_row,
    )


def checked_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    options: Options,
    inplace: bool,
    return_terms: bool,
    backend: str | None,
    per_row: PerRow,
) -> Tensor | KDTerms:
    """:func:`kd_loss` once its options have been checked."""
    chosen: backends.Backend = backends.PLAIN_CPU
    special = weight is not None or inplace or return_terms or bool(per_row)
    special = special or backend not in (None, "cpu")
    if special or not backends.PLAIN_CPU.serves(student, teacher, labels):
        check_tensors(student, teacher, labels, weight, options)
        check_per_row(per_row, options.divergence, student)
        chosen = backends.select(
            backend, student.device, student.dtype, teacher.dtype, options.unusual
        )
        if inplace:
            check_inplace(student, teacher, labels, weight)
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if forward_ad._current_level >= 0:
        needs_grad = (
            True  # autograd refuses forward mode there; elsewhere the tangent would be lost
        )
    if needs_grad and (chosen.name != "reference" or inplace):
        call = _Call(teacher, labels, weight, options, chosen, inplace, return_terms, per_row)
        result = _FusedKDLoss.apply(student, call)
        if inplace:
            _Overwritten.apply(student)
        return KDTerms(*result) if return_terms else result
    loss, soft, hard, *_ = chosen.run(
        student, teacher, labels, weight, options, return_terms, False, False, per_row
    )
    return KDTerms(loss, soft, hard) if return_terms else loss  # type: ignore[arg-type]
