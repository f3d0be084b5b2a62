"""The sums over the classes of a row, from which its loss and its gradient follow."""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.state import (
    LOG2E_HIGH,
    LOG2E_LEAST,
    LOG2E_LOW,
    LOWEST_DOUBLE,
    LOWEST_FLOAT,
    NO_HARD,
    OWN_EXPONENTIAL,
    ROUND,
    Sums,
    _any,
)

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
def _teacher_exponential(d, batch):
    """The same at the teacher's temperature."""
    high = batch.teacher_high
    return _exponential(d, high, batch.teacher_low, -127.0 / high, 1 / batch.teacher_temperature)


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
    if asked.decoupled:
        hole = columns[None, :] == tile.label[:, None]
        s, t = tl.where(hole, float("-inf"), s), tl.where(hole, float("-inf"), t)
    return s, t


@triton.jit
def _exponentials(s, t, student_max, teacher_max, batch, asked):
    """e^((s - max)/T), e^((t - max)/T), e^(s - max), and t - max less s - max.

    Equal logits have equal exponentials, whichever of the two rows they are in.
    """
    ds = _below(s, student_max)
    es = _soft_exponential(ds, batch)
    e1 = _hard_exponential(ds, es, asked)
    et, difference = es, ds
    if asked.soft:
        dt = _below(t, teacher_max)
        et, difference = _teacher_exponential(dt, batch), dt - ds
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
        if asked.mixture is None:
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
    factor = _decay(sums.teacher_max, step, 1 / batch.teacher_temperature)
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
