"""``kd_loss``: choice of backend and the ``torch.autograd.Function``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdkernels import backends
from kdkernels.backends.base import graph_is_kept, transforms_are_active
from kdkernels.backends.sharded import ShardedBackend
from kdkernels.call import Call
from kdkernels.checks import check_inplace, check_tensors
from kdkernels.dispatch import features_of, form_of, is_learned, one_per_row, select
from kdkernels.intra_class import with_intra_class
from kdkernels.learnable_temperature import with_rate
from kdkernels.means import with_items
from kdkernels.operators import traced_loss
from kdkernels.options import OPTION_NAMES, Prepared, prepare, prepare_plain
from kdkernels.reference import KDMetrics, KDTerms, kd_terms
from kdkernels.shift import shifted
from kdkernels.teachers import TopKTeacher, logits_of
from kdkernels.vocab_parallel import VocabParallel, is_dtensor, sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _FusedKDLoss(torch.autograd.Function):
    """The gradient is made in the forward; the backward hands it over, scaled if need be."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call) -> Tensor | tuple[Tensor | None, ...]:  # type: ignore[override]
        teacher, labels, weight, options, backend, inplace, want_terms, tensors = call
        loss, soft, hard, grad, grad_scale, metrics = backend.run(
            student, teacher, labels, weight, options, want_terms, True, inplace, tensors
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
        detached = (soft, hard, *metrics)
        ctx.mark_non_differentiable(*detached)
        return loss, *detached

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


def _call_of(ctx: Any) -> Call:
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
    if graph_is_kept():
        grad = grad.clone()  # what is handed over may be modified by whoever receives it
    else:
        ctx.grad = ctx.call = None
    return call.backend.scale(grad, incoming, ctx.grad_scale)


def _differentiable_gradient(ctx: Any, incoming: Tensor) -> Tensor:
    """The gradient under create_graph=True, by the reference, which can be differentiated."""
    call = _call_of(ctx)
    if isinstance(call.backend, ShardedBackend):
        raise RuntimeError("vocab_parallel has no second derivative (create_graph=True)")
    if call.inplace:
        raise RuntimeError(
            "inplace=True overwrote student_logits: no second derivative (create_graph=True)"
        )
    (student,) = ctx.saved_tensors
    call.check_unmodified(ctx.versions)
    # Through an alias: the hooks of the logits are for this gradient alone, and run once.
    alias = student.view_as(student)
    loss = kd_terms(alias, call.teacher, call.labels, call.options, call.weight, call.tensors).loss
    (grad,) = torch.autograd.grad(loss, alias, incoming, create_graph=True)
    return grad  # type: ignore[no-any-return]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKTeacher | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    temperature: float | Sequence[float] | Tensor | None = None,
    alpha: float = 0.9,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    distill_ignored: bool = False,
    inplace: bool = False,
    return_terms: bool | str = False,
    backend: str | None = None,
    divergence: str | Mapping[str, float | Tensor] = "forward_kl",
    beta: float | Tensor = 0.5,
    skew: float | Tensor = 0.1,
    divergence_alpha: float = 0.5,
    dkd_alpha: float = 1.0,
    dkd_beta: float = 8.0,
    nkd_gamma: float = 1.5,
    wsld_alpha: float = 2.25,
    dist_beta: float = 1.0,
    dist_gamma: float = 1.0,
    teacher_temperature: float | None = None,
    temperature_reduction: str = "mean",
    scale_by_t2: bool = True,
    standardize: bool = False,
    taid: float | None = None,
    agreement: float = 0.0,
    entropy_gap: float = 0.0,
    agreement_reduction: str | None = None,
    teacher_weights: Sequence[float] | None = None,
    ensemble: str = "probs",
    logit_softcap: float | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_bias: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    z_loss: float = 0.0,
    num_classes: int | None = None,
    sample_weight: Tensor | None = None,
    num_items: float | Tensor | tuple[float | Tensor, float | Tensor] | None = None,
    group: ProcessGroup | None = None,
    shift: int = 0,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor | KDTerms | KDMetrics:
    """Knowledge-distillation loss ``alpha · T² · KL(p ‖ q) + (1 - alpha) · CE(r, y)`` in one pass.

    With student logits s and teacher logits t: p = softmax(t/T), q = softmax(s/T), r = softmax(s)
    (Hinton, Vinyals and Dean 2015, arXiv:1503.02531). KL is summed over the classes. Its mean is
    over the rows that are not ignored, and the cross entropy is
    :func:`torch.nn.functional.cross_entropy`'s, weighted mean and label smoothing included; a batch
    with nothing active is 0. The teacher is a constant. Inputs are not modified.

    Args:
        student_logits: (..., C), float32, bfloat16, float16 or float64. The rows may be strided;
            they are copied only if neighbouring classes are not neighbours in memory.
        teacher_logits: (..., C), any of these dtypes, on the same device: logits, or
            log-probabilities taken at temperature 1, as a constant of a row means nothing; a
            :class:`kdkernels.TopKTeacher`; or several teachers, as a list of (..., C) or
            stacked, (K, ..., C).
        labels: (...), integers in [0, C) or ``ignore_index``; None needs ``alpha=1``.
        temperature: T > 0, dividing both logits; from 1e-6 to 1e6. Several in a list are several
            divergences (MLKD, CVPR 2023). A tensor, (...) or a scalar, has a temperature for each
            row, T² included; where it requires grad (CTKD, arXiv:2211.16231) it gets its gradient.
            Default: 4.0, and 1.0 with ``"nkd"``, ``"dist"``, ``"hard"``.
        alpha: share of the distillation term in [0, 1]. Default 0.9. A term whose share is 0 is
            no part of the loss, whatever its value.
        ignore_index: label of rows that contribute nothing, even if they hold NaN. Default -100.
        label_smoothing: in [0, 1], of the cross entropy. Default 0.0.
        weight: class weights of the cross entropy, (C,), no gradient. Default None.
        reduction: ``"mean"`` (default), ``"sum"``, or ``"none"`` for one loss per row.
        distill_ignored: the soft term covers ignored rows too: unlabelled images. Default False.
        inplace: write the gradient over ``student_logits`` and save its memory; the logits are
            lost, and autograd told so. Default False.
        return_terms: return ``KDTerms(loss, soft, hard)``, the terms detached; or ``"metrics"`` for
            :class:`kdkernels.KDMetrics`, entropies and accuracies beside them. Default False.
        backend: None (the best that can run), ``"cpu"``, ``"cuda"``, ``"triton"`` or
            ``"reference"``; ``python -m kdkernels info`` lists what is available.
        divergence: what stands in the place of KL(p ‖ q), by default ``"forward_kl"``. Between the
            two distributions: ``"reverse_kl"``, ``"jsd"``, ``"skew_forward_kl"``,
            ``"skew_reverse_kl"``, ``"total_variation"``, ``"alpha"``, ``"renyi"``; of image
            classification: ``"dkd"``, ``"nkd"``, ``"wsld"``, ``"dist"``, ``"hard"``. Or a mapping
            of such names to weights, numbers or one per row (...), for their weighted sum in the
            same pass. kdkernels/divergences.py has each in a few lines, with its paper.
        beta: β of ``"jsd"`` in [0, 1], or one per row (...). Default 0.5.
        skew: λ of the skewed divergences in [0, 1], or one per row (...). Default 0.1.
        divergence_alpha: a of ``"alpha"`` (any number; 1 and 0 are forward and reverse KL) and
            ``"renyi"`` (> 0). Default 0.5.
        dkd_alpha, dkd_beta: weights >= 0 of the two parts of ``"dkd"``. Default 1.0, 8.0.
        nkd_gamma: weight >= 0 of the other classes in ``"nkd"``. Default 1.5.
        wsld_alpha: weight >= 0 of ``"wsld"``. Default 2.25.
        dist_beta, dist_gamma: weights >= 0 of the parts of ``"dist"`` within a row and, made by
            PyTorch, across the batch. Default 1.0 each.
        teacher_temperature: divides the teacher logits. Default: ``temperature``.
        temperature_reduction: of several temperatures, ``"mean"`` (default) or ``"sum"``.
        scale_by_t2: multiply the divergence by T², so that its gradient does not shrink with the
            temperature. Default True.
        standardize: logits are (v - mean) / (std + 1e-7) of their row before the division by T, in
            the divergence alone (Sun et al. 2024, arXiv:2403.01427). Default False.
        taid: w in [0, 1]: the teacher is (1 - w) · the student's detached logits + w · its own
            (TAID, arXiv:2501.16937). Default None: the teacher as it is.
        agreement: weight of -log Σ p q, p and q at temperature 1, added to the loss. Default 0.0.
        entropy_gap: weight of (H(p) - H(q))², p and q at temperature 1, added. Default 0.0.
        agreement_reduction: ``"sum"`` to add the sum of these two over the rows to a mean of all
            else. Default None: as ``reduction``.
        teacher_weights: one number >= 0 for each of several teachers. Default: all the same.
        ensemble: several teachers are compared by the mean of their probabilities, ``"probs"``
            (default), or of their logits, ``"logits"``; or the mean is of their losses,
            ``"losses"``.
        logit_softcap: c > 0: logits are c · tanh(v / c), of both models (Gemma). The values of a
            ``TopKTeacher`` are taken as they are. Default None.
        logit_scale: logits are multiplied with it, both or (student, teacher); before the cap.
            Default 1.0.
        logit_bias: (C,), added to the logits of both, or (student, teacher), None for one that has
            none; before the scale. No gradient. Default None.
        z_loss: weight >= 0 of log²(Σ e^s), part of the cross entropy. Default 0.0.
        num_classes: the classes that student and teacher have in common where one of them is
            padded: all from there on are masked in both. Default: all.
        sample_weight: (...), >= 0, multiplies a row's loss; a mean divides by their sum. A row of
            weight 0 is left out. Default None.
        num_items: what a mean divides by, >= 0, in the place of the rows that count in this call: a
            number, or a tensor that no host looks at, of both terms or (soft, hard). With the rows
            of a whole step, over micro-batches and devices, the calls' losses add up to the mean.
            Default None.
        group: a process group of torch.distributed, whose processes all make the call: the mean is
            over the rows of all of them, times their number as DDP and FSDP divide the gradients'
            sum by it. ``dist.group.WORLD`` is None before init_process_group. Default None.
        shift: n >= 0: the logits of position i of (..., L, C) are those of the label at i + n, as
            labels of a causal language model come (n = 1); the last n predict nothing. The logits
            are not copied. Default 0.
        vocab_parallel: :class:`kdkernels.VocabParallel`: the classes are sharded over a process
            group, student and teacher alike, and the loss is that of the whole logits; or logits
            that are DTensors with ``Shard(-1)``. Default None.

    Returns:
        The loss, a scalar or (...) with ``reduction="none"``: float32, or float64 for float64
        student logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, value, shape or device; it is named.
        IndexError: a label outside [0, C) that is not ``ignore_index``, for CPU tensors. Elsewhere
            looking at labels would make the device wait: the row's loss is NaN, unless the
            environment variable ``KDKERNELS_CHECK_LABELS=1`` asks for the check.
        RuntimeError: the named backend cannot run here, and why.

    Under torch.compile and torch.export the loss is one operator, with the checks of values where
    the graph runs; ``inplace`` is refused. Under the transforms of torch.func the reference serves.
    """
    given = (
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
        dkd_alpha,
        dkd_beta,
        nkd_gamma,
        wsld_alpha,
        dist_beta,
        dist_gamma,
        teacher_temperature,
        temperature_reduction,
        scale_by_t2,
        standardize,
        taid,
        agreement,
        entropy_gap,
        agreement_reduction,
        teacher_weights,
        ensemble,
        logit_softcap,
        logit_scale,
        logit_bias,
        z_loss,
        num_classes,
    )
    if shift != 0:
        labels, sample_weight = shifted(labels, sample_weight, shift, ignore_index, distill_ignored)
    shard = vocab_parallel
    if torch.compiler.is_compiling() or transforms_are_active():
        named = dict(zip(OPTION_NAMES, given, strict=True))
        rows = (labels, weight, sample_weight, num_items, group)
        if shard is not None or is_dtensor(student_logits):
            return uncompiled_loss(student_logits, teacher_logits, *rows, shard, prepare(named))
        return traced_loss(student_logits, teacher_logits, *rows, named)
    plain = type(divergence) is str and type(beta) is float and type(skew) is float
    if plain and logit_bias is None and not isinstance(temperature, Tensor):
        prepared = prepare_plain(given)
    else:
        prepared = prepare(dict(zip(OPTION_NAMES, given, strict=True)))
    rows = (labels, weight, sample_weight, num_items, group)
    return checked_loss(student_logits, teacher_logits, *rows, shard, prepared)


def checked_loss(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    num_items: Any,
    group: ProcessGroup | None,
    shard: VocabParallel | None,
    prepared: Prepared,
) -> Tensor | KDTerms | KDMetrics:
    """:func:`kd_loss` once its options have been checked."""
    options, planned, features, tensors, inplace, return_terms, backend = prepared
    chosen: backends.Backend = backends.PLAIN_CPU
    rate = None
    special = weight is not None or inplace or bool(return_terms) or bool(tensors)
    special = special or backend not in (None, "cpu") or sample_weight is not None
    special = special or num_items is not None or group is not None or shard is not None
    if special or planned or not backends.PLAIN_CPU.serves(student, teacher, labels):
        if shard is not None or is_dtensor(student):
            local = sharded(
                shard, student, teacher, labels, sample_weight, weight, options, tensors
            )
            shard, student, teacher, labels, sample_weight = local
        if sample_weight is not None:
            tensors = {**tensors, "sample_weight": sample_weight}
        teacher = form_of(teacher, student)
        check_tensors(student, teacher, labels, weight, options, tensors)
        tensors = one_per_row(tensors, student)
        if num_items is not None or group is not None:
            mean_of = (num_items, group)
            tensors = with_items(tensors, *mean_of, student, labels, weight, options)
        learned = is_learned(tensors)
        features |= features_of(type(teacher), tensors.keys(), options, learned)
        dtypes = [t.dtype for t in logits_of(teacher)]
        chosen = select(student.device, student.dtype, dtypes, features, backend)
        if shard is not None:
            chosen = ShardedBackend(shard, chosen)
        if inplace:
            check_inplace(student, teacher, labels, weight, tensors)
        if learned and chosen.name != "reference" and options.alpha > 0:
            call = Call(teacher, labels, weight, options, chosen, inplace, False, tensors)
            rate = with_rate(student, call)
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if forward_ad._current_level >= 0:
        needs_grad = (
            True  # autograd refuses forward mode there; elsewhere the tangent would be lost
        )
    want_terms = bool(return_terms)
    if needs_grad and (chosen.name != "reference" or inplace):
        call = Call(teacher, labels, weight, options, chosen, inplace, want_terms, tensors)
        result = _FusedKDLoss.apply(student, call)
        if want_terms:
            result = KDMetrics(*result) if options.metrics else KDTerms(*result)
    else:
        loss, soft, hard, _, _, metrics = chosen.run(
            student, teacher, labels, weight, options, want_terms, False, False, tensors
        )
        result = loss
        if want_terms:
            kind = KDMetrics if options.metrics else KDTerms
            result = kind(loss, soft, hard, *metrics)  # type: ignore[arg-type]
    if planned and options.intra_class > 0 and options.alpha > 0:
        result = with_intra_class(result, student, teacher, labels, options, tensors, chosen)
    if rate is not None:
        result = result._replace(loss=result.loss + rate) if want_terms else result + rate
    if needs_grad and inplace:
        _Overwritten.apply(student)
    return result  # type: ignore[no-any-return]


def uncompiled_loss(*arguments: Any) -> Tensor | KDTerms | KDMetrics:
    """:func:`checked_loss` where a compiler is to leave off: processes exchange numbers in it."""
    return checked_loss(*arguments)


# As torch.compiler.disable does, without its import of the whole compiler.
uncompiled_loss._torchdynamo_disable = True  # type: ignore[attr-defined]
