"""The two terms of a row, its gradient, and whether float32 is enough for them."""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.state import (
    EPSILON,
    LOSS_BOUND,
    Entries,
    Factors,
)
from kdkernels.backends.triton_kernels.sums import (
    _exponentials,
    _reference,
)

# ---- terms ---------------------------------------------------------------------------------------


@triton.jit
def _soft_loss(sums, batch):
    """T² KL, (R,)."""
    t = batch.temperature
    student, teacher = sums.student + sums.student_ones, sums.teacher + sums.teacher_ones
    kl = sums.cross / (teacher * t) + tl.log(student / teacher)
    kl = tl.where(kl < 0, 0.0, kl)  # rounding; KL is not negative
    # The student has -inf where the teacher has mass.
    kl = tl.where((sums.lowest == float("-inf")) & (kl == kl), float("inf"), kl)
    kl = tl.where(student > 0, kl, float("nan"))  # every class masked: no distribution
    return t * t * kl


@triton.jit
def _hard_loss(sums, tile, w, at_label, batch, asked):
    """The cross entropy, (R,)."""
    lse = tl.log(sums.hard + sums.student_ones)
    maximum = _reference(sums.student_max).to(batch.temperature.dtype)
    epsilon = batch.smoothing
    loss = (1 - epsilon) * w * (lse - (at_label.to(batch.temperature.dtype) - maximum))
    if asked.smooth:
        smooth = epsilon / batch.classes
        loss += smooth * (batch.weight_sum * (lse + maximum) - sums.smooth)
    return tl.where(tile.bad, float("nan"), tl.where(tile.hard, loss, 0.0))


@triton.jit
def _loss_at_risk(sums, loss, factor, batch, asked, REAL: tl.constexpr):
    """Whether float32 exponentials are not good enough for the divergence.

    Their errors do not average out over the classes, as equal logits have equal ones, and the
    factor, T², multiplies those of both sums' logarithms. At T <= 4 no forward KL is at risk.
    """
    risk = tl.zeros(loss.shape, tl.int1)
    if batch.temperature.dtype != REAL:
        error = 2 * EPSILON * factor
        # Logits near the largest number; and powers, whose sum may be 0 in float32 alone.
        overflow = (loss == float("inf")) & (
            (sums.lowest > float("-inf")) | (asked.mixture is not None)
        )
        risk = (error > (1 + loss) * LOSS_BOUND) | overflow  # NaN is as exact as it gets
    return risk


@triton.jit
def _factors(sums, tile, w, batch, asked):
    zero = sums.student * 0
    student, teacher, hard, smooth, smooth_total, label = zero, zero, zero, zero, zero, zero
    if asked.soft_grad:
        student = batch.soft_scale / (sums.student + sums.student_ones)
        teacher = batch.soft_scale / (sums.teacher + sums.teacher_ones)
    if asked.hard_grad:
        scale = tl.where(tile.bad, float("nan"), tl.where(tile.hard, batch.hard_scale, 0.0))
        label = scale * (1 - batch.smoothing) * w
        if asked.smooth:
            smooth = -scale * (batch.smoothing / batch.classes)
            smooth_total = -smooth * batch.weight_sum
        hard = (label + smooth_total) / (sums.hard + sums.student_ones)
    return Factors(student, teacher, hard, smooth, smooth_total, label)


# ---- gradient ------------------------------------------------------------------------------------


@triton.jit
def _weights_at(index, mask, batch, asked):
    """Class weights, (R,), 1 without any."""
    w = tl.full(index.shape, 1.0, batch.temperature.dtype)
    if asked.weighted:
        w = tl.load(batch.weight + index, mask=mask, other=0.0)
    return w


@triton.jit
def _logits_at(pointer, index, mask, REAL: tl.constexpr):
    """One logit of each row, (R,)."""
    return tl.load(pointer + index, mask=mask, other=float("-inf")).to(REAL)


@triton.jit
def _entries(sums, vees, f, tile, keep, s_label, w, batch, asked):
    """The label's, where r_y - 1 cancels, and that of the class the student is sure of.

    The latter is a difference of two numbers near 1: 1 - q, 1 - p and 1 - r are had from the sums
    over all other classes.
    """
    # A cross entropy that is only logged leaves no trace in the gradient, not even its last bit.
    hard = tile.hard & keep & asked.hard_grad
    labelled = hard & ~tile.bad
    by_hard = hard & (sums.hard + sums.student_ones < 1.5)
    has_sure = keep & ((sums.student + sums.student_ones < 1.5) | by_hard) & (sums.at >= 0)
    t_label, t_sure = s_label, s_label
    if asked.soft_grad and asked.mixture is None:
        t_label = _logits_at(tile.teacher, tile.label, labelled, s_label.dtype)
        t_sure = _logits_at(tile.teacher, sums.at, has_sure, s_label.dtype)
    maxima = sums.student_max, sums.teacher_max
    es, et, e1, _ = _exponentials(s_label, t_label, maxima[0], maxima[1], batch, asked)
    _, et_sure, _, _ = _exponentials(s_label, t_sure, maxima[0], maxima[1], batch, asked)
    es, et, e1 = (
        es.to(batch.temperature.dtype),
        et.to(batch.temperature.dtype),
        e1.to(batch.temperature.dtype),
    )

    at_label = f.hard * e1 - f.label + f.smooth * w
    not_q, not_r = sums.student, sums.hard
    not_p = sums.teacher + (sums.teacher_ones - et_sure.to(batch.temperature.dtype))
    if asked.mixture is not None:  # v has the place of the teacher's exponentials
        et, not_p = vees.label, vees.others
    at_sure = f.teacher * not_p - f.student * not_q
    if asked.soft_grad:
        at_label += f.student * es - f.teacher * et
    if asked.hard_grad:
        # r - 1 is had as -(1 - r), on the label; off it, the 1 is put back.
        w_sure = _weights_at(sums.at, has_sure, batch, asked)
        at_sure += f.smooth_total - f.hard * not_r + f.smooth * w_sure
        at_sure = tl.where(tile.label == sums.at, at_sure, at_sure + f.label)
    return Entries(
        tl.where(labelled, tile.label, -1),
        at_label,
        tl.where(has_sure, sums.at, -1),
        at_sure,
        not_q,
        not_p,
        not_r,
    )


@triton.jit
def _gradient(es, et, e1, f, entries, columns, batch, asked, REAL: tl.constexpr):
    """The gradient of a tile, (R, BLOCK)."""
    g = tl.zeros(es.shape, REAL)
    if asked.soft_grad:
        # Two roundings, not one: where student and teacher agree this is exactly 0.
        g = f.student.to(REAL)[:, None] * es - f.teacher.to(REAL)[:, None] * et
    if asked.hard_grad:
        g = tl.fma(f.hard.to(REAL)[:, None], e1, g)
        if asked.smooth:
            smooth = f.smooth.to(REAL)[:, None]
            if asked.weighted:
                w = tl.load(batch.weight + columns, mask=columns < batch.classes, other=0.0)
                smooth = (f.smooth[:, None] * w[None, :]).to(REAL)
            g += smooth
    if asked.hard_grad or asked.decoupled:
        g = tl.where(
            columns[None, :] == entries.label[:, None], entries.at_label[:, None].to(REAL), g
        )
    return tl.where(columns[None, :] == entries.sure[:, None], entries.at_sure[:, None].to(REAL), g)


@triton.jit
def _store(pointer, g, columns, keep, write, classes):
    """A tile of the gradient; rows that are written and not kept get zeros."""
    mask = write[:, None] & (columns < classes)[None, :]
    if g.dtype == tl.float64 and pointer.dtype.element_ty != tl.float64:
        g = g.to(tl.float32)
    g = tl.where(keep[:, None], g, 0.0).to(pointer.dtype.element_ty)
    tl.store(pointer[:, None] + columns[None, :], g, mask=mask)


@triton.jit
def _squares(g, columns, batch):
    """Sum of the gradient's squares, (R, BLOCK) -> (R,)."""
    g = tl.where((columns < batch.classes)[None, :], g, 0.0)
    return tl.sum(g * g, 1).to(batch.temperature.dtype)


@triton.jit
def _squared(others, total, has_sure):
    """At most the sum of the squared probabilities, of which the largest is 1 / total; or of all
    but the sure one, whose exponentials add up to `others`."""
    small = tl.where(others < 1, others * others, others) / (total * total)
    return tl.where(has_sure, small, 1 / total)


@triton.jit
def _soft_error(sums, f, entries, has_sure):
    """The squared error of the divergence's gradient, in roundings of its entries, (R,)."""
    student, teacher = sums.student + sums.student_ones, sums.teacher + sums.teacher_ones
    both = _squared(entries.not_q, student, has_sure)
    both += _squared(entries.not_p, teacher, has_sure)
    return (f.student * student) * (f.student * student) * both


@triton.jit
def _needed_squares(sums, f, entries, error, tile, asked):
    """The sum of the gradient's squares below which float32 exponentials are not good enough.

    The gradient is a difference of exponentials, and may be small. Its norm may be off by half of
    what the package promises, as products are rounded, too.
    """
    bound: tl.constexpr = 1e-6 if tile.grad.dtype.element_ty == tl.float32 else 2.0**-13
    has_sure = entries.sure >= 0
    if asked.hard_grad:
        hard = sums.hard + sums.student_ones
        error += (f.hard * hard) * (f.hard * hard) * _squared(entries.not_r, hard, has_sure)
    return error * (EPSILON * EPSILON / (bound * bound))


@triton.jit
def _may_vanish(sums, tile, asked):
    """Whether the gradient may be exactly 0: teacher = student, and nothing else is asked for."""
    equal = (sums.cross == 0) & (asked.mixture is None)
    if asked.hard_grad:
        equal = equal & ~tile.hard
    return equal
