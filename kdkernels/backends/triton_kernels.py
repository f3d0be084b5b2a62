"""The fused loss in Triton: temperature softmax of both rows, KL divergence and cross entropy, and
the gradient. The twin of ``csrc/cpu/rows.inl`` and ``csrc/row_math.inl``, to the same numbers.

A program takes a tile of rows. Where the tile stays in registers the logits are read once; longer
rows are swept block by block, and again for the gradient. Exponentials are float32, what a row has
one of is float64, and a row for which float32 is not enough is swept again in double.

Compiled without contraction of ``a * b + c``: a student equal to its teacher then leaves a gradient
of exactly 0. Where one rounding is wanted, ``tl.fma`` says so.
"""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E_HIGH = tl.constexpr(1.44269502162933349609375)
LOG2E_LOW = tl.constexpr(1.9259629911e-8)
LOG2E_LEAST = tl.constexpr(-88.02969193111305)
LOWEST_FLOAT = tl.constexpr(-3.4028234663852886e38)
LOWEST_DOUBLE = tl.constexpr(-1.7976931348623157e308)
# 1.5 * 2^23 rounds to an integer when added; + 127 leaves it biased, ready to be an exponent.
ROUND = tl.constexpr(12582912.0 + 127.0)
# A float32 exponential is off by up to this much of itself.
EPSILON = tl.constexpr(2.0**-24)
LOSS_BOUND = tl.constexpr(2e-6)  # what the package promises, of 1 + loss

# How e^s is had: not at all, by an exponential of its own, or as e^(s/T) to the power of 1 to 4.
NO_HARD = tl.constexpr(0)
OWN_EXPONENTIAL = tl.constexpr(-1)

# ``scales``, the batch's numbers in device memory, by index.
TEMPERATURE = tl.constexpr(0)
ALPHA = tl.constexpr(1)
SMOOTHING = tl.constexpr(2)
EXPONENT_HIGH = tl.constexpr(3)  # log2(e) / T in two float32 parts
EXPONENT_LOW = tl.constexpr(4)
SOFT_ROWS = tl.constexpr(5)  # what the means divide by
HARD_ROWS = tl.constexpr(6)
WEIGHT_SUM = tl.constexpr(7)  # of all classes
SOFT_SCALE = tl.constexpr(8)  # of the gradient of a row's term
HARD_SCALE = tl.constexpr(9)
GRAD_SCALE = tl.constexpr(10)  # the power of two that float16 gradients are multiplied with
SCALES = 11


class Asked(NamedTuple):
    """What is to be computed, known when the kernel is compiled."""

    distill_ignored: bool
    soft: bool  # the divergence; without it the teacher is not read
    soft_grad: bool
    power: int  # the cross entropy: how e^s is had
    hard_grad: bool
    smooth: bool  # label smoothing
    weighted: bool
    grad: bool
    inplace: bool  # over the student's logits
    two_levels: bool  # rows are not all one stride apart


class Tile(NamedTuple):
    """Rows of one program, (R,) each; pointers are to their first class."""

    student: Any
    teacher: Any
    grad: Any
    active: Any  # takes part in the loss; others are not even read: they may hold NaN
    idle: Any  # gets a gradient of zeros
    hard: Any  # has a label
    label: Any  # 0 where it is out of range
    bad: Any  # it is out of range


class Batch(NamedTuple):
    """Scalars that all rows share: float64, or float32 on a GPU that has no other."""

    temperature: Any
    alpha: Any
    smoothing: Any
    weight_sum: Any
    soft_scale: Any
    hard_scale: Any
    high: Any  # log2(e) / T
    low: Any
    weight: Any  # pointer
    classes: Any


class Sums(NamedTuple):
    """Sums over the classes of each row, (R,), relative to its maxima.

    The maximum's class, whose exponential is exactly 1, is counted and not added: beside it the
    others would lose their digits.
    """

    student_max: Any
    teacher_max: Any
    at: Any  # class of the student's maximum
    student_ones: Any  # classes at the maximum
    teacher_ones: Any
    student: Any  # sum e^((s - max)/T) of the others
    teacher: Any
    cross: Any  # sum e^((t - max)/T) ((t - max) - (s - max))
    hard: Any  # sum e^(s - max) of the others
    smooth: Any  # sum w * s
    lowest: Any  # of the student's logits where the teacher has mass


class Verdict(NamedTuple):
    """Both terms of each row, (R,), and whether float32 was enough for them."""

    soft: Any
    hard: Any
    loss_exact: Any
    grad_exact: Any


class Factors(NamedTuple):
    """What the exponentials are multiplied with to make the gradient, (R,)."""

    student: Any
    teacher: Any
    hard: Any
    smooth: Any  # of the class weights: -epsilon / C
    smooth_total: Any  # the same summed over the classes, without its sign
    label: Any  # taken off at the label


class Entries(NamedTuple):
    """Entries of the gradient that cancel in float32 and are had on their own, (R,)."""

    label: Any  # class, -1: none
    at_label: Any
    sure: Any  # the class the student is sure of, -1: none
    at_sure: Any
    not_q: Any  # the exponentials of all other classes
    not_p: Any
    not_r: Any


# ---- arithmetic ----------------------------------------------------------------------------------


@triton.jit
def _from_bits(bits, WIDE: tl.constexpr):
    """The float64 whose bits the host passed as an integer: a float would arrive as float32."""
    if tl.float64 == WIDE:
        number = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        number = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _exponential(d, high, low, least, inverse_t):
    """e^(d/T) for d <= 0: exactly 1 at 0 and 0 at -inf; NaN for NaN.

    In float32, 2^(d * scale) with the scale in two parts, as d may be -100 and more and its product
    with a rounded scale would be off by 100 roundings; the hardware's own is not exact enough.
    """
    if d.dtype == tl.float64:
        result = tl.exp(d * inverse_t)
    else:
        d = tl.maximum(d, least, propagate_nan=tl.PropagateNan.ALL)
        biased = tl.fma(d, high, ROUND)
        f = tl.fma(d, high, -(biased - ROUND))
        f = tl.fma(d, low, f)
        # The minimax polynomial of csrc/cpu/vectors.inl.
        p = tl.fma(f, 0.00015594677, 0.00134066438)
        p = tl.fma(p, f, 0.00961769297)
        p = tl.fma(p, f, 0.05550310551)
        p = tl.fma(p, f, 0.24022652783)
        p = tl.fma(p, f, 0.69314721497)
        p = tl.fma(p, f, 1.0)
        exponent = biased.to(tl.int32, bitcast=True) << 23
        result = p * exponent.to(tl.float32, bitcast=True)
    return result


@triton.jit
def _soft_exponential(d, batch):
    """e^(d/T)."""
    return _exponential(d, batch.high, batch.low, -127.0 / batch.high, 1 / batch.temperature)


@triton.jit
def _hard_exponential(d, soft_exponential, asked):
    """e^d, from e^(d/T) where T is a small integer."""
    result = soft_exponential
    if asked.power == OWN_EXPONENTIAL:
        result = _exponential(d, LOG2E_HIGH, LOG2E_LOW, LOG2E_LEAST, 1.0)
    elif asked.power == 2:
        result = soft_exponential * soft_exponential
    elif asked.power == 3:
        result = soft_exponential * soft_exponential * soft_exponential
    elif asked.power == 4:
        square = soft_exponential * soft_exponential
        result = square * square
    return result


@triton.jit
def _reference(maximum):
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _below(x, maximum):
    """x - maximum; the lowest number for -inf, which times a probability of 0 is 0 and not NaN."""
    lowest: tl.constexpr = LOWEST_DOUBLE if x.dtype == tl.float64 else LOWEST_FLOAT
    floor = tl.full([], lowest, x.dtype)
    return tl.maximum(x - _reference(maximum), floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _total(x, batch):
    """Sum over the classes, (R, BLOCK) -> (R,).

    Fours are added in float32, as a tree: equal ones, whose errors would not average out, without
    any rounding. Widening each number would cost more than its exponential.
    """
    if x.dtype == tl.float32:
        fours = tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2])
        x = tl.sum(tl.sum(fours, 3), 2)
    return tl.sum(x.to(batch.temperature.dtype), 1)


# ---- sums ----------------------------------------------------------------------------------------


@triton.jit
def _load(pointer, columns, keep, classes, REAL: tl.constexpr):
    """Logits of a tile, (R, BLOCK), -inf beyond the row; rows that are not kept are not read."""
    mask = keep[:, None] & (columns < classes)[None, :]
    return tl.load(pointer[:, None] + columns[None, :], mask=mask, other=float("-inf")).to(REAL)


@triton.jit
def _load_both(tile, keep, columns, batch, asked, REAL: tl.constexpr):
    s = _load(tile.student, columns, keep, batch.classes, REAL)
    t = s
    if asked.soft:
        t = _load(tile.teacher, columns, keep, batch.classes, REAL)
    return s, t


@triton.jit
def _exponentials(s, t, student_max, teacher_max, batch, asked):
    """e^((s - max)/T), e^((t - max)/T), e^(s - max), and the difference of the exponents times T.

    Equal logits have equal exponentials, whichever of the two rows they are in.
    """
    ds = _below(s, student_max)
    es = _soft_exponential(ds, batch)
    e1 = _hard_exponential(ds, es, asked)
    et, difference = es, ds
    if asked.soft:
        dt = _below(t, teacher_max)
        et, difference = _soft_exponential(dt, batch), dt - ds
    return es, et, e1, difference


@triton.jit
def _tile_exponentials(s, t, sums, batch, asked):
    """The same for (R, BLOCK) logits and the maxima of the sums."""
    return _exponentials(s, t, sums.student_max[:, None], sums.teacher_max[:, None], batch, asked)


@triton.jit
def _no_sums(R: tl.constexpr, REAL: tl.constexpr, batch):
    none, zero = tl.full([R], float("-inf"), REAL), tl.zeros([R], batch.temperature.dtype)
    at, most = tl.full([R], -1, tl.int32), tl.full([R], float("inf"), REAL)
    return Sums(none, none, at, zero, zero, zero, zero, zero, zero, zero, most)


@triton.jit
def _ones(is_max, maximum, batch):
    """How many classes are at the maximum; NaN if that is +inf, from which nothing follows."""
    count = tl.sum(is_max.to(tl.int32), 1).to(batch.temperature.dtype)
    return tl.where(maximum < float("inf"), count, float("nan"))


@triton.jit
def _weighted(s, columns, batch, asked):
    """Sum of w * s, (R, BLOCK) -> (R,)."""
    inside = columns < batch.classes
    products = s.to(batch.temperature.dtype)
    if asked.weighted:
        products *= tl.load(batch.weight + columns, mask=inside, other=0.0)[None, :]
    return tl.sum(tl.where(inside[None, :], products, 0.0), 1)


@triton.jit
def _add(sums, s, t, es, et, e1, difference, columns, batch, asked):
    """The sums with one tile or block added, whose exponentials are relative to their maxima."""
    is_max = s == _reference(sums.student_max)[:, None]
    student_ones = sums.student_ones + _ones(is_max, sums.student_max, batch)
    student = sums.student + _total(tl.where(is_max, 0.0, es), batch)
    teacher_ones, teacher = sums.teacher_ones, sums.teacher
    cross, hard, smooth, lowest = sums.cross, sums.hard, sums.smooth, sums.lowest
    if asked.soft:
        teacher_is_max = t == _reference(sums.teacher_max)[:, None]
        teacher_ones += _ones(teacher_is_max, sums.teacher_max, batch)
        teacher += _total(tl.where(teacher_is_max, 0.0, et), batch)
        cross += _total(et * difference, batch)
        with_mass = tl.where(t > float("-inf"), s, float("inf"))
        lowest = tl.minimum(lowest, tl.min(with_mass, 1))
    if asked.power != NO_HARD:
        hard += _total(tl.where(is_max, 0.0, e1), batch)
    if asked.smooth:
        smooth += _weighted(s, columns, batch, asked)
    return Sums(
        sums.student_max,
        sums.teacher_max,
        sums.at,
        student_ones,
        teacher_ones,
        student,
        teacher,
        cross,
        hard,
        smooth,
        lowest,
    )


@triton.jit
def _find(s, maximum, columns):
    """The class of each row's maximum, the last of several, (R, BLOCK) -> (R,); -1 if none."""
    return tl.max(tl.where(s == _reference(maximum)[:, None], columns[None, :], -1), 1)


@triton.jit
def _start(s, t, columns, R: tl.constexpr, batch):
    """Maxima of rows that one tile holds, and no sums yet."""
    zero = _no_sums(R, s.dtype, batch)
    student_max = tl.max(s, 1)
    return Sums(
        student_max,
        tl.max(t, 1),
        _find(s, student_max, columns),
        zero.student_ones,
        zero.teacher_ones,
        zero.student,
        zero.teacher,
        zero.cross,
        zero.hard,
        zero.smooth,
        zero.lowest,
    )


@triton.jit
def _decay(old, step, inverse_t):
    """What sums relative to the old maximum are multiplied with when it is raised by a step."""
    # Nothing was seen below a maximum of -inf, and e^-step may overflow.
    return tl.where(old == float("-inf"), 0.0, tl.exp(-step * inverse_t))


@triton.jit
def _raise_student(sums, student_max, at, batch, asked):
    """The sums moved over to a new maximum of the student."""
    raised = student_max > sums.student_max
    step = student_max.to(batch.temperature.dtype) - _reference(sums.student_max).to(
        batch.temperature.dtype
    )
    soft = _decay(sums.student_max, step, 1 / batch.temperature)
    hard = _decay(sums.student_max, step, 1.0)
    cross = sums.cross + (sums.teacher + sums.teacher_ones) * step
    return Sums(
        tl.where(raised, student_max, sums.student_max),
        sums.teacher_max,
        tl.where(raised, at, sums.at),
        tl.where(raised, 0.0, sums.student_ones),
        sums.teacher_ones,
        tl.where(raised, (sums.student + sums.student_ones) * soft, sums.student),
        sums.teacher,
        tl.where(raised, cross, sums.cross),
        tl.where(raised, (sums.hard + sums.student_ones) * hard, sums.hard),
        sums.smooth,
        sums.lowest,
    )


@triton.jit
def _raise_teacher(sums, teacher_max, batch, asked):
    """The sums moved over to a new maximum of the teacher."""
    raised = teacher_max > sums.teacher_max
    step = teacher_max.to(batch.temperature.dtype) - _reference(sums.teacher_max).to(
        batch.temperature.dtype
    )
    factor = _decay(sums.teacher_max, step, 1 / batch.temperature)
    teacher = sums.teacher + sums.teacher_ones
    cross = tl.where(factor == 0, 0.0, factor * (sums.cross - teacher * step))
    return Sums(
        sums.student_max,
        tl.where(raised, teacher_max, sums.teacher_max),
        sums.at,
        sums.student_ones,
        tl.where(raised, 0.0, sums.teacher_ones),
        sums.student,
        tl.where(raised, teacher * factor, sums.teacher),
        tl.where(raised, cross, sums.cross),
        sums.hard,
        sums.smooth,
        sums.lowest,
    )


@triton.jit
def _any(rows):
    """Whether it holds for any row, as a scalar."""
    return tl.max(rows.to(tl.int32), 0) > 0


@triton.jit
def _raise_maxima(sums, s, t, columns, batch, asked):
    """The sums moved over to maxima that hold for the next block, which can then be added."""
    student_max = tl.max(s, 1)
    if _any(student_max > sums.student_max):  # rare after the first blocks
        at = _find(s, student_max, columns)
        sums = _raise_student(sums, student_max, at, batch, asked)
    if asked.soft:
        teacher_max = tl.max(t, 1)
        if _any(teacher_max > sums.teacher_max):
            sums = _raise_teacher(sums, teacher_max, batch, asked)
    return sums


@triton.jit
def _sweep(tile, batch, asked, REAL: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of rows of any length."""
    sums = _no_sums(R, REAL, batch)
    for first in range(0, batch.classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t = _load_both(tile, tile.active, columns, batch, asked, REAL)
        sums = _raise_maxima(sums, s, t, columns, batch, asked)
        es, et, e1, difference = _tile_exponentials(s, t, sums, batch, asked)
        sums = _add(sums, s, t, es, et, e1, difference, columns, batch, asked)
    return sums


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
def _loss_at_risk(sums, loss, batch, asked, REAL: tl.constexpr):
    """Whether float32 exponentials are not good enough for the divergence.

    Their errors do not average out over the classes, as equal logits have equal ones, and T²
    multiplies those of both sums' logarithms. At T <= 4 no loss is at risk.
    """
    risk = tl.zeros(loss.shape, tl.int1)
    if batch.temperature.dtype != REAL:
        error = 2 * EPSILON * batch.temperature * batch.temperature
        # Logits near the largest number.
        overflow = (loss == float("inf")) & (sums.lowest > float("-inf"))
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
def _entries(sums, f, tile, keep, s_label, w, batch, asked):
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
    if asked.soft_grad:
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
def _needed_squares(sums, f, entries, tile, batch, asked):
    """The sum of the gradient's squares below which float32 exponentials are not good enough.

    The gradient is a difference of exponentials, and may be small. Its norm may be off by half of
    what the package promises, as products are rounded, too.
    """
    bound: tl.constexpr = 1e-6 if tile.grad.dtype.element_ty == tl.float32 else 2.0**-13
    has_sure = entries.sure >= 0
    error = sums.student * 0
    if asked.soft_grad:
        student, teacher = sums.student + sums.student_ones, sums.teacher + sums.teacher_ones
        both = _squared(entries.not_q, student, has_sure)
        both += _squared(entries.not_p, teacher, has_sure)
        error += (f.student * student) * (f.student * student) * both
    if asked.hard_grad:
        hard = sums.hard + sums.student_ones
        error += (f.hard * hard) * (f.hard * hard) * _squared(entries.not_r, hard, has_sure)
    return error * (EPSILON * EPSILON / (bound * bound))


@triton.jit
def _may_vanish(sums, tile, asked):
    """Whether the gradient may be exactly 0: teacher = student, and nothing else is asked for."""
    equal = sums.cross == 0
    if asked.hard_grad:
        equal = equal & ~tile.hard
    return equal


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def _terms(sums, tile, s_label, w, batch, asked):
    soft, hard = sums.student * 0, sums.student * 0
    if asked.soft:
        soft = tl.where(tile.active, _soft_loss(sums, batch), 0.0)
    if asked.power != NO_HARD:
        hard = _hard_loss(sums, tile, w, s_label, batch, asked)
    return soft, hard


@triton.jit
def _visit_tile(tile, columns, batch, asked, R: tl.constexpr):
    """Rows that one tile holds, in float32: read once."""
    s_label = _logits_at(tile.student, tile.label, tile.hard, tl.float32)
    w = _weights_at(tile.label, tile.hard, batch, asked)
    s, t = _load_both(tile, tile.active, columns, batch, asked, tl.float32)
    sums = _start(s, t, columns, R, batch)
    es, et, e1, difference = _tile_exponentials(s, t, sums, batch, asked)
    sums = _add(sums, s, t, es, et, e1, difference, columns, batch, asked)
    soft, hard = _terms(sums, tile, s_label, w, batch, asked)
    loss_risk = tile.active & _loss_at_risk(sums, soft, batch, asked, tl.float32)
    risk = loss_risk
    if asked.grad:
        f = _factors(sums, tile, w, batch, asked)
        entries = _entries(sums, f, tile, tile.active, s_label, w, batch, asked)
        needed = _needed_squares(sums, f, entries, tile, batch, asked)
        g = _gradient(es, et, e1, f, entries, columns, batch, asked, tl.float32)
        squares = _squares(g, columns, batch)
        vanishes = _may_vanish(sums, tile, asked) & (squares == 0)
        risk = risk | (tile.active & (needed > squares) & ~vanishes)
        # In place, a row that is at risk must not be overwritten before it is swept again.
        _store(tile.grad, g, columns, tile.active, ~risk & (tile.active | tile.idle), batch.classes)
    return soft, hard, loss_risk, risk


@triton.jit
def _gradient_block(sums, f, entries, tile, keep, columns, batch, asked, REAL: tl.constexpr):
    s, t = _load_both(tile, keep, columns, batch, asked, REAL)
    es, et, e1, _ = _tile_exponentials(s, t, sums, batch, asked)
    return _gradient(es, et, e1, f, entries, columns, batch, asked, REAL)


@triton.jit
def _visit_blocks(tile, batch, asked, REAL: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of any length, block by block: read once for the sums, again for the gradient."""
    s_label = _logits_at(tile.student, tile.label, tile.hard, REAL)
    w = _weights_at(tile.label, tile.hard, batch, asked)
    sums = _sweep(tile, batch, asked, REAL, R, BLOCK)
    soft, hard = _terms(sums, tile, s_label, w, batch, asked)
    loss_risk = tile.active & _loss_at_risk(sums, soft, batch, asked, REAL)
    risk = loss_risk
    if asked.grad:
        f = _factors(sums, tile, w, batch, asked)
        keep = tile.active & ~risk
        entries = _entries(sums, f, tile, keep, s_label, w, batch, asked)
        needed = _needed_squares(sums, f, entries, tile, batch, asked)
        may_vanish = _may_vanish(sums, tile, asked)
        judged: tl.constexpr = batch.temperature.dtype != REAL
        squares = tl.zeros([R], batch.temperature.dtype)
        if asked.inplace and judged:
            # Rehearsed, as a row that is at risk must not be overwritten before it is swept again.
            for first in range(0, batch.classes, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                g = _gradient_block(sums, f, entries, tile, keep, columns, batch, asked, REAL)
                squares += _squares(g, columns, batch)
            risk = risk | (keep & (needed > squares) & ~(may_vanish & (squares == 0)))
            keep = tile.active & ~risk
        for first in range(0, batch.classes, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            g = _gradient_block(sums, f, entries, tile, keep, columns, batch, asked, REAL)
            if judged and not asked.inplace:
                squares += _squares(g, columns, batch)
            _store(tile.grad, g, columns, keep, keep | tile.idle, batch.classes)
        if judged and not asked.inplace:
            risk = risk | (keep & (needed > squares) & ~(may_vanish & (squares == 0)))
    return soft, hard, loss_risk, risk


@triton.jit
def _starts(row, inner, outer, step, TWO_LEVELS: tl.constexpr):
    """Elements before each row, in 64 bits: see ``laid_out`` in kdkernels/backends/native.py."""
    start = row * outer
    if TWO_LEVELS:
        start = row // inner * outer + row % inner * step
    return start


@triton.jit
def _blend(alpha, soft, hard):
    # A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
    both = alpha * soft + (1 - alpha) * hard
    return tl.where(alpha == 0, hard, tl.where(alpha == 1, soft, both))


@triton.jit
def _load_batch(scales, weight, classes, asked):
    weight_or_any = scales
    if asked.weighted:
        weight_or_any = weight
    return Batch(
        tl.load(scales + TEMPERATURE),
        tl.load(scales + ALPHA),
        tl.load(scales + SMOOTHING),
        tl.load(scales + WEIGHT_SUM),
        tl.load(scales + SOFT_SCALE),
        tl.load(scales + HARD_SCALE),
        tl.load(scales + EXPONENT_HIGH).to(tl.float32),
        tl.load(scales + EXPONENT_LOW).to(tl.float32),
        weight_or_any,
        classes,
    )


@triton.jit
def _tile(
    student,
    teacher,
    grad,
    labels,
    row,
    rows,
    classes,
    ignore_index,
    student_inner,
    student_outer,
    student_step,
    teacher_inner,
    teacher_outer,
    teacher_step,
    grad_inner,
    grad_outer,
    grad_step,
    asked,
):
    live = row < rows
    active = live
    hard = live & (row < 0)
    bad = hard
    label = row * 0
    if labels is not None:
        label = tl.load(labels + row, mask=live, other=0).to(tl.int64)
        hard = live & (label != ignore_index)
        if not asked.distill_ignored:
            active = hard
        bad = hard & ((label < 0) | (label >= classes))
        label = tl.where(hard & ~bad, label, 0)
    student += _starts(row, student_inner, student_outer, student_step, asked.two_levels)
    teacher += _starts(row, teacher_inner, teacher_outer, teacher_step, asked.two_levels)
    grad_at = student
    if asked.grad:
        grad_at = grad + _starts(row, grad_inner, grad_outer, grad_step, asked.two_levels)
    idle = live & ~active
    return Tile(student, teacher, grad_at, active, idle, hard, label.to(tl.int32), bad)


@triton.jit
def _put(pointer, index, value, mask):
    tl.store(pointer + index, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _put_terms(terms, loss, soft_out, hard_out, alpha, row, rows, soft, hard, write):
    if terms is not None:
        tl.store(terms + row, soft, mask=write)
        tl.store(terms + rows + row, hard, mask=write)
    else:
        _put(loss, row, _blend(alpha, soft, hard), write)
        if soft_out is not None:
            _put(soft_out, row, soft, write)
            _put(hard_out, row, hard, write)


# Rows and ignore_index would only bring new variants to compile. Classes and strides that are
# divisible by 16 are worth one: they let rows be read 16 bytes at a time.
NOT_SPECIALIZED = [
    "rows",
    "ignore_index",
    "student_inner",
    "student_step",
    "teacher_inner",
    "teacher_step",
    "grad_inner",
    "grad_step",
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def rows_kernel(
    student,
    teacher,
    grad,  # None: loss only; may be the student
    labels,  # None: every row active, no cross entropy
    weight,
    scales,
    terms,  # [2, rows] for finish_kernel; None: the losses of the rows are what is asked for
    loss,  # [rows]
    soft_out,
    hard_out,
    flags,  # [rows], of the rows that again_kernel is to visit; None: none, all is in double
    rows,
    classes,
    ignore_index: tl.int64,
    student_inner,
    student_outer,
    student_step,
    teacher_inner,
    teacher_outer,
    teacher_step,
    grad_inner,
    grad_outer,
    grad_step,
    asked: tl.constexpr,  # Asked
    REAL: tl.constexpr,  # the type that the rows are computed in
    R: tl.constexpr,  # rows of a program
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,  # a block holds whole rows
):
    """The terms of every row, and its gradient."""
    batch = _load_batch(scales, weight, classes, asked)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    tile = _tile(
        student,
        teacher,
        grad,
        labels,
        row,
        rows,
        classes,
        ignore_index,
        student_inner,
        student_outer,
        student_step,
        teacher_inner,
        teacher_outer,
        teacher_step,
        grad_inner,
        grad_outer,
        grad_step,
        asked,
    )
    if RESIDENT:
        columns = tl.arange(0, BLOCK)
        soft, hard, loss_risk, risk = _visit_tile(tile, columns, batch, asked, R)
    else:
        soft, hard, loss_risk, risk = _visit_blocks(tile, batch, asked, REAL, R, BLOCK)
    live = row < rows
    if flags is not None:
        flag = tl.where(loss_risk, 2, tl.where(risk, 1, 0))
        tl.store(flags + row, flag.to(tl.int8), mask=live)
    _put_terms(terms, loss, soft_out, hard_out, batch.alpha, row, rows, soft, hard, live)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def again_kernel(
    student,
    teacher,
    grad,  # None: loss only; may be the student
    labels,  # None: every row active, no cross entropy
    weight,
    scales,
    terms,  # [2, rows] for finish_kernel; None: the losses of the rows are what is asked for
    loss,  # [rows]
    soft_out,
    hard_out,
    flags,  # [rows], of the rows that again_kernel is to visit; None: none, all is in double
    rows,
    classes,
    ignore_index: tl.int64,
    student_inner,
    student_outer,
    student_step,
    teacher_inner,
    teacher_outer,
    teacher_step,
    grad_inner,
    grad_outer,
    grad_step,
    asked: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows that float32 was not enough for, in double.

    A kernel of its own, or its registers would be those of every row. A few programs look at the
    flags of all rows.
    """
    batch = _load_batch(scales, weight, classes, asked)
    for at in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = at + tl.arange(0, 1).to(tl.int64)
        flag = tl.load(flags + row)
        if tl.max(flag, 0) > 0:
            tile = _tile(
                student,
                teacher,
                grad,
                labels,
                row,
                rows,
                classes,
                ignore_index,
                student_inner,
                student_outer,
                student_step,
                teacher_inner,
                teacher_outer,
                teacher_step,
                grad_inner,
                grad_outer,
                grad_step,
                asked,
            )
            soft, hard, _, _ = _visit_blocks(tile, batch, asked, scales.dtype.element_ty, 1, BLOCK)
            # A gradient done again leaves the loss alone: asking for one does not change the other.
            _put_terms(
                terms,
                loss,
                soft_out,
                hard_out,
                batch.alpha,
                row,
                rows,
                soft,
                hard,
                flag == 2,
            )


# ---- the batch -----------------------------------------------------------------------------------


@triton.jit
def _count(
    labels, weight, begin, end, classes, ignore_index, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Labels that are active among [begin, end), and the sum of their class weights."""
    count, weights = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], WIDE)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        label = tl.load(labels + row, mask=row < end, other=0).to(tl.int64)
        hard = (row < end) & (label != ignore_index)
        count += hard.to(tl.int64)
        if weight is not None:
            # Out of range, the loss will be NaN; the others' gradients are the reference's.
            label = tl.where((label >= 0) & (label < classes), label, 0)
            weights += tl.load(weight + label, mask=hard, other=0.0)
    total = tl.sum(count, 0).to(WIDE)
    total_weight = total
    if weight is not None:
        total_weight = tl.sum(weights, 0)
    return total, total_weight


@triton.jit(do_not_specialize=["rows", "share", "classes", "ignore_index"])
def count_kernel(
    labels,
    weight,
    counts,  # [2, programs]
    rows,
    share,
    classes,
    ignore_index: tl.int64,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The counts of each program's share of the labels, where there are too many for one."""
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    rows_, weights = _count(labels, weight, begin, end, classes, ignore_index, WIDE, BLOCK)
    tl.store(counts + tl.program_id(0), rows_)
    tl.store(counts + tl.num_programs(0) + tl.program_id(0), weights)


@triton.jit
def _sum(pointer, begin, end, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], WIDE)
    for first in range(begin, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(pointer + index, mask=index < end, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _largest(pointer, end, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], WIDE)
    for first in range(0, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(pointer + index, mask=index < end, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def _float16_scale(bound):
    """The power of two that brings the largest possible entry of the gradient to about 2^14.

    float16 has five bits of exponent: a gradient of 1/(N*C) would be lost in its subnormals before
    a gradient scaler could lift it.
    """
    usable = (bound > 0) & (bound < float("inf"))
    exponent = tl.floor(tl.log2(16384 / tl.where(usable, bound, 16384.0)))
    exponent = tl.minimum(exponent, 100.0)
    if bound.dtype == tl.float64:
        power = ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit(
    do_not_specialize=[
        "rows",
        "parts",
        "classes",
        "ignore_index",
        "temperature",
        "alpha",
        "smoothing",
        "exponent_high",
        "exponent_low",
    ]
)
def scales_kernel(
    labels,
    weight,
    counts,  # of count_kernel, [2, parts]; None: few enough to be counted here
    scales,
    rows,
    parts,
    classes,
    ignore_index: tl.int64,
    temperature: tl.int64,  # the bits of these numbers
    alpha: tl.int64,
    smoothing: tl.int64,
    exponent_high: tl.int64,
    exponent_low: tl.int64,
    MEAN: tl.constexpr,
    DISTILL_IGNORED: tl.constexpr,
    FLOAT16: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What all rows share, and what the means divide by, without the host having to know."""
    one = tl.full([], 1.0, WIDE)
    soft_rows, hard_rows = one, one
    if MEAN:
        soft_rows = rows.to(WIDE)
        if labels is not None:
            if counts is not None:
                active = _sum(counts, 0, parts, WIDE, BLOCK)
                hard_rows = _sum(counts + parts, 0, parts, WIDE, BLOCK)
            else:
                active, hard_rows = _count(
                    labels, weight, 0, rows, classes, ignore_index, WIDE, BLOCK
                )
            if not DISTILL_IGNORED:
                soft_rows = active
        # Nothing active is 0, not 0/0.
        soft_rows = tl.where(soft_rows == 0, one, soft_rows)
        hard_rows = tl.where(hard_rows == 0, one, hard_rows)
    weight_sum, max_weight = classes.to(WIDE), one
    if weight is not None:
        weight_sum = _sum(weight, 0, classes, WIDE, BLOCK)
        max_weight = tl.maximum(one, _largest(weight, classes, WIDE, BLOCK))
    t, a = _from_bits(temperature, WIDE), _from_bits(alpha, WIDE)
    soft_scale = a * t / soft_rows
    hard_scale = (1 - a) / hard_rows
    grad_scale = one
    if FLOAT16:
        grad_scale = _float16_scale(soft_scale + 2 * hard_scale * max_weight)
    tl.store(scales + TEMPERATURE, t)
    tl.store(scales + ALPHA, a)
    tl.store(scales + SMOOTHING, _from_bits(smoothing, WIDE))
    tl.store(scales + EXPONENT_HIGH, _from_bits(exponent_high, WIDE))
    tl.store(scales + EXPONENT_LOW, _from_bits(exponent_low, WIDE))
    tl.store(scales + SOFT_ROWS, soft_rows)
    tl.store(scales + HARD_ROWS, hard_rows)
    tl.store(scales + WEIGHT_SUM, weight_sum)
    tl.store(scales + SOFT_SCALE, soft_scale * grad_scale)
    tl.store(scales + HARD_SCALE, hard_scale * grad_scale)
    tl.store(scales + GRAD_SCALE, grad_scale)


@triton.jit(do_not_specialize=["rows", "share"])
def sum_kernel(terms, sums, rows, share, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of each program's share of the rows' terms, [2, rows] -> [2, programs]."""
    part = tl.program_id(0)
    begin = part.to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    tl.store(sums + part, _sum(terms, begin, end, WIDE, BLOCK))
    tl.store(sums + tl.num_programs(0) + part, _sum(terms + rows, begin, end, WIDE, BLOCK))


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    terms,  # [2, rows]
    scales,
    loss,
    soft_out,
    hard_out,
    rows,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss and its terms from those of the rows, in an order that depends on nothing else."""
    soft = _sum(terms, 0, rows, WIDE, BLOCK) / tl.load(scales + SOFT_ROWS)
    hard = _sum(terms + rows, 0, rows, WIDE, BLOCK) / tl.load(scales + HARD_ROWS)
    _put(loss, 0, _blend(tl.load(scales + ALPHA), soft, hard), True)
    if soft_out is not None:
        _put(soft_out, 0, soft, True)
        _put(hard_out, 0, hard, True)


# ---- backward ------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["rows", "inner", "step", "incoming_inner", "incoming_outer", "incoming_step"]
)
def scale_kernel(
    grad,
    incoming,  # one number per row
    grad_scale,  # divided out; None: 1
    rows,
    classes,
    inner,
    outer,
    step,
    incoming_inner,
    incoming_outer,
    incoming_step,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient times what flows in from above, in place; not even read where that is 1."""
    REAL: tl.constexpr = WIDE if grad.dtype.element_ty == tl.float64 else tl.float32
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for first in range(tl.program_id(0).to(tl.int64) * R, rows, tl.num_programs(0) * R):
        row = first + tl.arange(0, R)
        at = _starts(row, incoming_inner, incoming_outer, incoming_step, True)
        factor = tl.load(incoming + at, mask=row < rows, other=1.0).to(WIDE)
        if grad_scale is not None:
            factor = factor / tl.load(grad_scale)
        if _any(factor != 1):
            mask = (row < rows)[:, None] & (columns < classes)[None, :]
            pointer = grad + _starts(row, inner, outer, step, True)[:, None] + columns[None, :]
            g = tl.load(pointer, mask=mask, other=0.0).to(REAL)
            # 0 * inf: what has no gradient, such as an ignored row, has none whatever comes in.
            g = tl.where(g == 0, g, g * factor.to(REAL)[:, None])
            tl.store(pointer, g.to(grad.dtype.element_ty), mask=mask)
