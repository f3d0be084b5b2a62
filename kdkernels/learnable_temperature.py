"""The gradient of a temperature that is learned: Li et al. 2023 (CTKD), arXiv:2211.16231.

A divergence D of s / T and t / T has dD/dT = -(Σ s dD/ds + Σ t dD/dt) / T. The kernels make dD/ds;
dD/dt is the same of the divergence with teacher and student in each other's place, which is one of
the family again. So a row's rate comes from two more runs of them, whatever the backend.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import Backend
from kdkernels.call import Call
from kdkernels.divergences import PerRow, Term
from kdkernels.options import Options
from kdkernels.reference import accumulation_dtype, kd_terms
from kdkernels.teachers import TopKTeacher

# D(p, q) of the first is D(q, p) of the second, with the parameter as `_swapped` has it.
EXCHANGED = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "jsd": "jsd",
    "skew_forward_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_forward_kl",
    "total_variation": "total_variation",
    "alpha": "alpha",
    "renyi": "renyi",
}
# Logits at a time: what the two runs make beside the gradient of the loss stays this small, and on
# the CPU in its caches; a GPU wants more work.
CHUNK = {"cpu": 2**18}
LARGE_CHUNK = 2**24


def what_has_no_rate(options: Options, kind: type, names: Collection[str]) -> str | None:
    """Beside what only the reference learns a temperature; None: the kernels do.

    ``kind``: of the teacher; ``names``: of the options that are tensors.
    """
    o = options
    asked = {
        "standardize": o.standardize,
        "taid": o.taid is not None,
        "logit_softcap": o.softcap is not None,
        "logit_scale": (o.student_scale, o.teacher_scale) != (1.0, 1.0),
        "logit_bias": "student_bias" in names or "teacher_bias" in names,
        "a top-k teacher": issubclass(kind, TopKTeacher),
        "several teachers": issubclass(kind, tuple),
    }
    asked |= {f"divergence {t.name}": t.name not in EXCHANGED for t in o.divergence}
    # Rényi's of order a is a / (1 - a) times that of order 1 - a, which has to be one.
    renyi = [term.parameter for term in o.divergence if term.name == "renyi"]
    asked["divergence_alpha >= 1 of renyi"] = any(a >= 1 for a in renyi)
    return next((name for name, is_asked in asked.items() if is_asked), None)


def _swapped(term: Term) -> Term:
    weight, parameter = term.weight, term.parameter
    if term.name == "renyi":
        weight *= parameter / (1 - parameter)
    if term.name in ("jsd", "alpha", "renyi"):
        parameter = 1 - parameter
    return Term(EXCHANGED[term.name], weight, parameter)


def _swapped_tensors(tensors: PerRow, divergence: tuple[Term, ...]) -> PerRow:
    """What is given per row, for the divergence with p and q exchanged."""
    other = {EXCHANGED.get(name, name): values for name, values in tensors.items()}
    if "beta" in tensors:
        other["beta"] = 1 - tensors["beta"]
    for term in divergence:
        if term.name == "renyi" and "renyi" in tensors:
            other["renyi"] = tensors["renyi"] * (term.parameter / (1 - term.parameter))
    return other


class _OfTemperature(torch.autograd.Function):
    """Zero, in the shape of the loss, with the loss's gradient for the temperature."""

    @staticmethod
    def forward(ctx: Any, temperature: Tensor, student: Tensor, call: Call) -> Tensor:  # type: ignore[override]
        ctx.call, ctx.rate = call, rate_of(temperature, student, call)
        ctx.save_for_backward(temperature, student)  # for a second derivative
        ctx.versions, ctx.dtype = call.versions(), temperature.dtype
        shape = temperature.shape if call.options.reduction == "none" else ()
        return student.new_zeros(shape, dtype=accumulation_dtype(student.dtype))

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _differentiable_rate(ctx, incoming), None, None
        return (incoming * ctx.rate).to(ctx.dtype), None, None


def _differentiable_rate(ctx: Any, incoming: Tensor) -> Tensor:
    """The gradient under create_graph=True, by the reference, which can be differentiated."""
    temperature, student = ctx.saved_tensors
    call: Call = ctx.call
    call.check_unmodified(ctx.versions)
    alias = temperature.view_as(temperature)  # whose hooks are for this gradient alone
    tensors = {**call.tensors, "temperature": alias}
    loss = kd_terms(student, call.teacher, call.labels, call.options, call.weight, tensors).loss
    (rate,) = torch.autograd.grad(loss, alias, incoming, create_graph=True)
    return rate  # type: ignore[no-any-return]


def rate_of(temperature: Tensor, student: Tensor, call: Call) -> Tensor:
    """d loss / d temperature of each row, (...)."""
    o, classes = call.options, call.options.num_classes or student.shape[-1]
    others = ("temperature", "num_items")
    per_row = {n: v for n, v in call.tensors.items() if n not in others}
    per_row["temperature"] = temperature
    if call.labels is not None:
        per_row["labels"] = call.labels
    assert isinstance(call.teacher, Tensor)  # or it has no rate
    student, teacher = student[..., :classes], call.teacher[..., :classes]
    if student.dim() == 1:  # a row by itself
        student, teacher = student.unsqueeze(0), teacher.unsqueeze(0)
        per_row = {name: values.unsqueeze(0) for name, values in per_row.items()}
    chunk = CHUNK.get(student.device.type, LARGE_CHUNK)
    at_once = max(1, chunk // max(1, student[:1].numel()))
    if len(student) <= at_once:
        rates = _soft_rate(student, teacher, per_row, call)
    else:
        parts = [slice(start, start + at_once) for start in range(0, len(student), at_once)]
        rates = torch.cat(
            [
                _soft_rate(student[p], teacher[p], {n: v[p] for n, v in per_row.items()}, call)
                for p in parts
            ]
        )
    weight = _soft_weight(temperature, call)
    # A row that is left out has no rate, whatever it holds.
    rate = torch.where(weight == 0, 0.0, o.alpha * rates.reshape(temperature.shape))
    total = call.tensors["num_items"][0] if "num_items" in call.tensors else weight.sum()
    return rate / torch.where(total == 0, 1.0, total) if o.reduction == "mean" else rate


def _soft_weight(like: Tensor, call: Call) -> Tensor:
    """Of each row in the mean of the soft term; 0 where it has none."""
    weight = call.tensors.get("sample_weight", torch.ones_like(like)).double()
    if call.labels is not None and not call.options.distill_ignored:
        weight = torch.where(call.labels != call.options.ignore_index, weight, 0.0)
    return weight


@functools.lru_cache(maxsize=256)
def _of_the_soft_term(o: Options) -> tuple[Options, Options]:
    """The options of the soft term alone, and with teacher and student exchanged."""
    options = Options(
        o.temperature,
        alpha=1.0,
        ignore_index=o.ignore_index,
        label_smoothing=0.0,
        reduction="none",
        distill_ignored=o.distill_ignored,
        divergence=o.divergence,
        teacher_temperature=o.teacher_temperature,
        scale_by_t2=o.scale_by_t2,
    )
    return options, options._replace(divergence=tuple(map(_swapped, o.divergence)))


def _soft_rate(student: Tensor, teacher: Tensor, per_row: PerRow, call: Call) -> Tensor:
    """The rate of each row's soft term, (...), float64."""
    labels, tensors = per_row.get("labels"), {n: v for n, v in per_row.items() if n != "labels"}
    temperature = tensors["temperature"].double()
    options, exchanged = _of_the_soft_term(call.options)
    soft, moment = _moment(student, teacher, labels, options, tensors, call.backend)
    if options.teacher_temperature is None:  # else the teacher does not move with it
        others = _swapped_tensors(tensors, options.divergence)
        moment = moment + _moment(teacher, student, labels, exchanged, others, call.backend)[1]
    scaled = 2 * soft.double() if options.scale_by_t2 else 0.0
    return (scaled - moment) / temperature


def _moment(
    moving: Tensor,
    fixed: Tensor,
    labels: Tensor | None,
    options: Options,
    tensors: PerRow,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """A row's loss, and the sum of its logits times their gradients in float64, (...) each."""
    wide = moving.to(accumulation_dtype(moving.dtype))  # or its gradient were rounded to 16 bits
    loss, *_, grad, scale, _ = backend.run(
        wide, fixed, labels, None, options, False, True, False, tensors
    )
    assert grad is not None
    # A row's gradients add up to 0, so that any constant may go; what is masked (-inf) has none.
    centred = (wide - wide.amax(-1, keepdim=True)).clamp_(min=-1e30)
    return loss, torch.linalg.vecdot(centred, grad).double() / scale


def with_rate(student: Tensor, call: Call) -> Tensor:
    """Zero, to be added to the loss, through which the temperature gets its gradient."""
    zero: Tensor = _OfTemperature.apply(call.tensors["temperature"], student, call)
    return zero
