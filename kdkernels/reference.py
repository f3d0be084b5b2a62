"""The definition of truth: every loss of this package in plain, twice differentiable PyTorch.

The compiled backends are tested against this file in float64. It favours being read over being
fast, and materialises everything that the fused kernels never do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.divergences import (
    DIVERGENCES,
    PerRow,
    Row,
    agreement,
    entropy,
    entropy_gap,
    mixture_rows,
)
from kdkernels.teachers import Teacher, TopKTeacher, logits_of

if TYPE_CHECKING:
    from kdkernels.options import Options


class KDTerms(NamedTuple):
    """What ``kd_loss(..., return_terms=True)`` returns; ``soft`` and ``hard`` are detached.

    Attributes:
        loss: ``alpha * soft + (1 - alpha) * hard``, and what agreement and entropy_gap add,
            reduced as asked.
        soft: the divergence between teacher and student, times T², reduced as asked.
        hard: cross entropy with the labels, reduced as asked; zero without labels.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor


class KDMetrics(NamedTuple):
    """What ``kd_loss(..., return_terms="metrics")`` returns; all but ``loss`` are detached.

    The last four are means over the rows they are defined for, or one value per row with
    ``reduction="none"``; probabilities are those at temperature 1.

    Attributes:
        loss, soft, hard: as in :class:`KDTerms`.
        student_entropy, teacher_entropy: in nats, over the rows of the soft term.
        top1_agreement: share of these rows whose largest class is the teacher's.
        accuracy: share of the rows with a label whose largest class is that.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    accuracy: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the loss for logits of ``dtype``: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mean(rows: Tensor, denominator: Tensor) -> Tensor:
    # Nothing active is 0, not 0/0, and still connected to the graph (DDP needs a gradient).
    return rows.sum() / torch.where(denominator == 0, 1.0, denominator)


class _Rows(NamedTuple):
    """What takes part in the loss and what does not, (N,) each."""

    target: Tensor  # 0 where there is none
    soft: Tensor  # bool
    hard: Tensor  # bool
    out_of_range: Tensor  # bool; on the CPU that has raised
    weight: Tensor  # the sample's


def _rows(labels: Tensor | None, ones: Tensor, classes: int, o: Options, tensors: PerRow) -> _Rows:
    weight = tensors["sample_weight"].reshape(-1).to(ones) if "sample_weight" in tensors else ones
    counted = weight != 0
    nothing = torch.zeros_like(counted)
    if labels is None:
        return _Rows(torch.zeros_like(counted, dtype=torch.long), counted, nothing, nothing, weight)
    target = labels.reshape(-1).long()
    hard = (target != o.ignore_index) & counted
    in_range = (target >= 0) & (target < classes)
    # Labels out of range are never used as an index: on a GPU that would end the process.
    return _Rows(
        torch.where(hard & in_range, target, 0),
        counted if o.distill_ignored else hard,
        hard,
        hard & ~in_range,
        weight,
    )


def effective(
    logits: Tensor, keep: Tensor, bias: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """Logits as the model means them: cap · tanh(scale · (v + bias) / cap), (N, C)."""
    # Ignored rows are replaced before any arithmetic: 0 * NaN would reach the gradient.
    logits = torch.where(keep[:, None], logits, 0.0)
    logits = scale * (logits if bias is None else logits + bias.to(logits))
    if cap is None:
        return logits
    masked = logits == -torch.inf  # stays masked
    return torch.where(masked, logits, cap * torch.tanh(torch.where(masked, 0.0, logits) / cap))


def _standardized(logits: Tensor) -> Tensor:
    """(v - mean) / (std + 1e-7) over the classes that are not masked: Sun et al. 2024,
    arXiv:2403.01427."""
    seen = logits > -torch.inf
    seen = seen | logits.isnan()
    count = seen.sum(-1, keepdim=True)
    centred = torch.where(seen, logits, 0.0)
    centred = torch.where(seen, centred - centred.sum(-1, keepdim=True) / count, 0.0)
    variance = (centred**2).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    constant = variance == 0  # whose standard deviation has no derivative, and is 0
    std = torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt())
    return torch.where(seen, centred / (std + 1e-7), logits)


def _mix(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """Logits of the intermediate teacher: Shing et al. 2025 (TAID), arXiv:2501.16937."""
    if share in (0, 1):  # 0 * inf
        return teacher if share == 1 else student.detach()
    return (1 - share) * student.detach() + share * teacher


class _Teacher(NamedTuple):
    """The teacher's rows, in whatever form they came."""

    forms: list[tuple[float, Tensor]]  # weights, effective logits (N, C)
    ensemble: str
    top_k: TopKTeacher | None

    def standardized(self) -> _Teacher:
        return self._replace(forms=[(w, _standardized(t)) for w, t in self.forms])

    def views(self, temperature: Tensor, log_q: Tensor) -> list[tuple[float, Tensor, Tensor]]:
        """Weights, and log p and log q of the classes that the divergence runs over."""
        if self.top_k is not None:
            return [(1.0, *_of_top_k(self.top_k, self.forms[0][1], temperature, log_q))]
        logs = [(w, F.log_softmax(t / temperature, -1)) for w, t in self.forms]
        if self.ensemble == "losses" or len(logs) == 1:
            return [(w, log_p, log_q) for w, log_p in logs]
        log_weights = log_q.new_tensor([w for w, _ in logs]).log()
        stacked = torch.stack([log_p for _, log_p in logs], -1)
        return [(1.0, torch.logsumexp(stacked + log_weights, -1), log_q)]


def _of_top_k(
    teacher: TopKTeacher, values: Tensor, temperature: Tensor, log_q: Tensor
) -> tuple[Tensor, Tensor]:
    indices = teacher.indices.reshape(values.shape).long()
    if teacher.tail == "renormalize":
        log_p = torch.full_like(log_q, -torch.inf)
        logits = values * teacher.temperature
        return log_p.scatter(-1, indices, F.log_softmax(logits / temperature, -1)), log_q
    of_q = log_q.gather(-1, indices)
    if teacher.tail == "zero" or values.shape == log_q.shape:  # there is no other class
        return values, of_q
    kept = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, indices, True)
    rest = torch.logsumexp(log_q.masked_fill(kept, -torch.inf), -1, keepdim=True)
    total = torch.logsumexp(values, -1, keepdim=True)
    # Rounding may leave a little more than 1; what remains is then nothing.
    full = total >= 0
    remains = torch.where(full, -torch.inf, torch.log(-torch.expm1(torch.where(full, -1.0, total))))
    return torch.cat((values, remains), -1), torch.cat((of_q, rest), -1)


def _teacher_of(
    teacher: Teacher, student: Tensor, keep: Tensor, o: Options, tensors: PerRow
) -> _Teacher:
    if isinstance(teacher, TopKTeacher):
        values = teacher.values.detach().reshape(len(student), -1).to(student.dtype)
        return _Teacher([(1.0, torch.where(keep[:, None], values, 0.0))], "probs", teacher)
    teachers = [teacher] if isinstance(teacher, Tensor) else teacher
    weights = o.teacher_weights or (1.0,) * len(teachers)
    forms = []
    for weight, t in zip(weights, teachers, strict=True):
        if weight == 0:  # no part of it, whatever it holds
            continue
        logits = t.detach()[..., : student.shape[-1]].reshape(student.shape).to(student.dtype)
        bias = tensors.get("teacher_bias")
        logits = effective(logits, keep, bias, o.teacher_scale, o.softcap)
        forms.append((weight / sum(weights), logits))
    if o.ensemble == "logits":
        forms = [(1.0, torch.stack([w * t for w, t in forms]).sum(0))] if len(forms) > 1 else forms
    if o.taid is not None:
        forms = [(w, _mix(student, t, o.taid)) for w, t in forms]
    return _Teacher(forms, o.ensemble, None)


def _soft_rows(
    student: Tensor, teacher: _Teacher, rows: _Rows, o: Options, tensors: PerRow
) -> Tensor:
    """The divergence of each row, times T²."""
    log_q1 = F.log_softmax(student, -1)
    at_one = teacher.views(torch.ones_like(student[:, :1]), log_q1)
    if o.standardize:
        student, teacher = _standardized(student), teacher.standardized()
    ones = torch.ones_like(student[:, :1])
    if "temperature" in tensors:
        temperatures = [tensors["temperature"].to(student).reshape(-1, 1) * ones]
    else:
        temperatures = [t * ones for t in o.temperatures or (o.temperature,)]
    averaged = o.temperature_reduction == "mean"
    total = torch.zeros_like(student[:, 0])
    labelled = any(DIVERGENCES[term.name].labelled for term in o.divergence)
    for temperature in temperatures:
        factor = temperature.squeeze(-1) ** 2 if o.scale_by_t2 else torch.ones_like(total)
        log_q = F.log_softmax(student / temperature, -1)
        of_teacher = ones * o.teacher_temperature if o.teacher_temperature else temperature
        views = teacher.views(of_teacher, log_q)
        for (weight, log_p, of_q), (_, log_p1, _) in zip(views, at_one, strict=True):
            row = Row(rows.target, log_p1, log_q1, factor)
            total = total + weight * factor * mixture_rows(log_p, of_q, row, o.divergence, tensors)
    if labelled:
        total = total * torch.where(rows.out_of_range, torch.nan, 1.0)
    return total / len(temperatures) if averaged else total


def _hard_rows(student: Tensor, rows: _Rows, weight: Tensor | None, o: Options) -> Tensor:
    ce = F.cross_entropy(
        student, rows.target, weight=weight, label_smoothing=o.label_smoothing, reduction="none"
    )
    if o.z_loss:
        ce = ce + o.z_loss * torch.logsumexp(student, -1) ** 2
    return ce * torch.where(rows.out_of_range, torch.nan, 1.0)  # the gradient's row as well


def _extra_rows(student: Tensor, teacher: _Teacher, o: Options) -> Tensor:
    """What agreement and entropy gap add, of the probabilities at temperature 1."""
    total = torch.zeros_like(student[:, 0])
    log_q = F.log_softmax(student, -1)
    for weight, log_p, of_q in teacher.views(torch.ones_like(student[:, :1]), log_q):
        if o.agreement:
            total = total + weight * o.agreement * agreement(log_p, of_q)
        if o.entropy_gap:
            total = total + weight * o.entropy_gap * entropy_gap(log_p, of_q)
    return total


def _prepared(
    student_logits: Tensor,
    teacher_logits: Teacher,
    labels: Tensor | None,
    o: Options,
    tensors: PerRow,
) -> tuple[Tensor, _Teacher, _Rows]:
    """The student's effective logits (N, C), the teacher, and which rows take part."""
    dtype = accumulation_dtype(student_logits.dtype)
    for t in logits_of(teacher_logits):
        dtype = torch.promote_types(dtype, accumulation_dtype(t.dtype))
    classes = o.num_classes or student_logits.shape[-1]
    student = student_logits[..., :classes].reshape(-1, classes).to(dtype)
    rows = _rows(labels, torch.ones_like(student[:, 0]), classes, o, tensors)
    bias = tensors.get("student_bias")
    student = effective(student, rows.soft, bias, o.student_scale, o.softcap)
    return student, _teacher_of(teacher_logits, student, rows.soft, o, tensors), rows


def kd_terms(
    student_logits: Tensor,  # [..., C]
    teacher_logits: Teacher,  # [..., C] each
    labels: Tensor | None,  # [...]
    options: Options,
    weight: Tensor | None = None,  # [C]
    tensors: PerRow | None = None,
) -> KDTerms | KDMetrics:
    """The loss as :func:`kdkernels.kd_loss` documents it; divergences.py has its soft term."""
    o, tensors = options, tensors or {}
    leading = student_logits.shape[:-1]
    student, teacher, rows = _prepared(student_logits, teacher_logits, labels, o, tensors)
    weight = None if weight is None else weight.to(student)
    soft = _soft_rows(student, teacher, rows, o, tensors)
    hard = _hard_rows(student, rows, weight, o)
    extra = _extra_rows(student, teacher, o)
    soft, extra = (torch.where(rows.soft, x * rows.weight, 0.0) for x in (soft, extra))
    hard = torch.where(rows.hard, hard * rows.weight, 0.0)
    if o.reduction == "none":
        soft, hard, extra = (x.reshape(leading) for x in (soft, hard, extra))
    elif o.reduction == "sum":
        soft, hard, extra = soft.sum(), hard.sum(), extra.sum()
    else:
        of_class = torch.ones_like(hard) if weight is None else weight[rows.target]
        soft_items = torch.where(rows.soft, rows.weight, 0.0).sum()
        hard_items = torch.where(rows.hard, rows.weight * of_class, 0.0).sum()
        if "num_items" in tensors:
            soft_items, hard_items = tensors["num_items"].to(soft)
        soft = _mean(soft, soft_items)
        extra = extra.sum() if o.agreement_reduction == "sum" else _mean(extra, soft_items)
        hard = _mean(hard, hard_items)
    # A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
    parts = [w * term for w, term in ((o.alpha, soft), (1 - o.alpha, hard)) if w != 0]
    if o.agreement or o.entropy_gap:
        parts.append(extra)
    loss_dtype = accumulation_dtype(student_logits.dtype)
    terms = KDTerms(
        sum(parts[1:], parts[0]).to(loss_dtype),
        soft.detach().to(loss_dtype),
        hard.detach().to(loss_dtype),
    )
    if not o.metrics:
        return terms
    metrics = _metrics(student, teacher, rows, o, leading)
    return KDMetrics(*terms, *(m.to(loss_dtype) for m in metrics))


def probabilities(
    student_logits: Tensor,
    teacher_logits: Teacher,
    labels: Tensor | None,
    options: Options,
    tensors: PerRow,
) -> tuple[Tensor, Tensor, Tensor]:
    """p and q, (N, C), at the temperature of the loss, and which rows have a soft term, (N, 1)."""
    student, teacher, rows = _prepared(student_logits, teacher_logits, labels, options, tensors)
    ones, of_teacher = torch.ones_like(student[:, :1]), options.teacher_temperature
    log_q = F.log_softmax(student / options.temperature, -1)
    views = teacher.views(ones * (of_teacher or options.temperature), log_q)
    terms = [log_p.exp() if weight == 1 else weight * log_p.exp() for weight, log_p, _ in views]
    return sum(terms[1:], terms[0]), log_q.exp(), rows.soft[:, None]


@torch.no_grad()
def _metrics(
    student: Tensor, teacher: _Teacher, rows: _Rows, o: Options, leading: torch.Size
) -> list[Tensor]:
    log_q = F.log_softmax(student, -1)
    views = teacher.views(torch.ones_like(student[:, :1]), log_q)
    log_p = torch.logsumexp(torch.stack([log_p + math.log(w) for w, log_p, _ in views], -1), -1)
    guess, of_teacher = log_q.argmax(-1), log_p.argmax(-1)
    if teacher.top_k is not None:
        best = teacher.forms[0][1].argmax(-1, keepdim=True)
        indices = teacher.top_k.indices.reshape(teacher.forms[0][1].shape).long()
        of_teacher = indices.gather(-1, best).squeeze(-1)
    metrics = [
        (entropy(log_q), rows.soft),
        (entropy(log_p), rows.soft),
        ((guess == of_teacher).to(student), rows.soft),
        ((guess == rows.target).to(student), rows.hard),
    ]
    masked = [torch.where(active, value, 0.0) for value, active in metrics]
    if o.reduction == "none":
        return [value.reshape(leading) for value in masked]
    return [
        _mean(value, active.to(student).sum())
        for value, (_, active) in zip(masked, metrics, strict=True)
    ]
