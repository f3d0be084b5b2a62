"""Decoupled distillation (Zhao et al. 2022, arXiv:2203.08679): the binary divergence between the
label and all else, and the divergence among all else. The sweeps see a row whose label is masked;
what belongs to the label is added by its log-odds: 1 - q_y formed by a subtraction would be 0.

The twin of ``csrc/cpu/decoupled.inl``.
"""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.gradient import _logits_at, _squared
from kdkernels.backends.triton_kernels.state import (
    FACTOR,
    NO_HARD,
    PARAMETERS,
    Entries,
    Factors,
)
from kdkernels.backends.triton_kernels.sums import _exponentials, _reference


class Odds(NamedTuple):
    """The label against all other classes, (R,)."""

    label: Any  # its probability
    others: Any
    log_label: Any
    log_others: Any


class Decoupled(NamedTuple):
    """What the log-odds of a row's label come to, (R,)."""

    soft: Any
    hard: Any
    off: Any  # by how many times forward KL's error the soft term may be off
    of_others: Any  # weight of the divergence among the others, in the gradient
    more: Any  # the label's entry of the soft term's gradient
    label_off: Any  # its error, in roundings
    not_label: Any  # 1 - r_y


# ---- odds ----------------------------------------------------------------------------------------


@triton.jit
def _softplus(x):
    """log(1 + e^x)."""
    return tl.log(1 + tl.exp(-tl.abs(x))) + tl.where(x > 0, x, 0.0)


@triton.jit
def _odds(logit, maximum, temperature, total):
    """Of a logit against the others, whose exponentials add up to a total relative to a maximum."""
    z = (logit.to(total.dtype) - _reference(maximum).to(total.dtype)) / temperature - tl.log(total)
    z = tl.where(logit < float("inf"), z, float("nan"))
    return Odds(1 / (1 + tl.exp(-z)), 1 / (1 + tl.exp(z)), -_softplus(-z), -_softplus(z))


@triton.jit
def _divergence(a, log_a, log_b):
    """a (log a - log b); nothing for a probability of 0."""
    return tl.where(a == 0, 0.0, a * (log_a - log_b))


@triton.jit
def _not_negative(x):
    return tl.where(x < 0, 0.0, x)  # rounding


@triton.jit
def _among_others(sums, batch):
    """The divergence of the other classes, (R,)."""
    student, teacher = sums.student + sums.student_ones, sums.teacher + sums.teacher_ones
    kl = sums.cross / (teacher * batch.temperature) + tl.log(student / teacher)
    masked = (sums.lowest == float("-inf")) & (kl == kl)
    masked = masked | ((student == 0) & (teacher > 0))
    kl = tl.where(masked, float("inf"), _not_negative(kl))
    return tl.where(teacher == 0, 0.0, kl)


@triton.jit
def _decouple(sums, tile, s_label, w, batch, asked):
    student, teacher = sums.student + sums.student_ones, sums.teacher + sums.teacher_ones
    t_label = _logits_at(tile.teacher, tile.label, tile.hard, s_label.dtype)
    q = _odds(s_label, sums.student_max, batch.temperature, student)
    p = _odds(t_label, sums.teacher_max, batch.temperature, teacher)
    # Of the two differences the one that does not cancel.
    more = tl.where(q.label > 0.5, p.others - q.others, q.label - p.label)
    target = _divergence(p.label, p.log_label, q.log_label)
    target = _not_negative(target + _divergence(p.others, p.log_others, q.log_others))
    of_label, of_others = tl.load(batch.scales + PARAMETERS), tl.load(batch.scales + PARAMETERS + 1)
    # Where the teacher has nothing but the label, all else has no part in it.
    of_others = tl.where(teacher == 0, 0.0, of_others)
    # A term of weight zero is no part of the loss.
    soft = tl.where(of_label == 0, 0.0, of_label * target)
    soft += tl.where(of_others == 0, 0.0, of_others * _among_others(sums, batch))
    factor = tl.load(batch.scales + FACTOR)
    hard, not_label = student * 0, student * 0
    if asked.power != NO_HARD:
        r = _odds(s_label, sums.student_max, 1.0, sums.hard + sums.student_ones)
        hard, not_label = -w * r.log_label, r.others
    nan = tl.where(tile.bad, float("nan"), 0.0)
    return Decoupled(
        tl.where(tile.active, factor * soft, 0.0) + nan,
        tl.where(tile.active, hard, 0.0) + nan,
        factor * (tl.abs(of_label) + tl.abs(of_others)),
        batch.soft_scale * of_others + nan,
        batch.soft_scale * of_label * more,
        batch.soft_scale * of_label * q.label * q.others,
        not_label,
    )


# ---- gradient ------------------------------------------------------------------------------------


@triton.jit
def _over(x, total):
    """Of classes that have no mass there is nothing to share."""
    return tl.where(total == 0, 0.0, x / total)


@triton.jit
def _decoupled_factors(d, sums, w, batch, asked):
    student, teacher, label, zero = d.more * 0, d.more * 0, d.more * 0, sums.student * 0
    if asked.soft_grad:
        student = _over(d.of_others - d.more, sums.student + sums.student_ones)
        teacher = _over(d.of_others, sums.teacher + sums.teacher_ones)
    if asked.hard_grad:
        label = batch.hard_scale * w * d.not_label
    return Factors(student, teacher, _over(label, sums.hard + sums.student_ones), zero, zero, label)


@triton.jit
def _decoupled_entries(d, sums, f, tile, keep, s_label, batch, asked):
    """The label's, and that of a class that is nearly all of the others: where all their mass is,
    both shares are 1 less something."""
    student = sums.student + sums.student_ones
    by_hard = asked.hard_grad & (sums.hard + sums.student_ones < 1.5)
    has_sure = keep & ((student < 1.5) | by_hard) & (sums.at >= 0)
    at_label, at_sure, not_p = -f.label, f.hard, sums.student * 0
    if asked.soft_grad:
        t_sure = _logits_at(tile.teacher, sums.at, has_sure, s_label.dtype)
        _, et, _, _ = _exponentials(
            s_label, t_sure, sums.student_max, sums.teacher_max, batch, asked
        )
        not_p = sums.teacher + (sums.teacher_ones - et.to(sums.teacher.dtype))
        at_label += d.more
        at_sure += f.teacher * not_p - _over(d.of_others * sums.student + d.more, student)
    return Entries(
        tl.where(tile.hard & keep, tile.label, -1),
        at_label,
        tl.where(has_sure, sums.at, -1),
        at_sure,
        sums.student,
        not_p,
        sums.hard,
    )


@triton.jit
def _decoupled_error(d, sums, f, entries):
    """The squared error of the soft term's gradient, in roundings of its entries, (R,)."""
    student, teacher = sums.student + sums.student_ones, sums.teacher + sums.teacher_ones
    has_sure = entries.sure >= 0
    of_student, of_teacher = f.student * student, f.teacher * teacher
    error = of_student * of_student * _squared(entries.not_q, student, has_sure)
    error += of_teacher * of_teacher * _squared(entries.not_p, teacher, has_sure)
    return tl.where(student * teacher == 0, 0.0, error) + 16 * d.label_off * d.label_off
