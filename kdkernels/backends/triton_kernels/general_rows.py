"""The rows of the general kernel as it computes with them: logits of any type, mapped and mixed, in
float64 scratch; and what a softmax needs to know of such a row.

Threads write scratch that other threads read: each sweep that writes stands between two barriers.
"""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.state import _starts

# What is in the table of numbers: these, and then passes, terms and teachers.
PASSES = tl.constexpr(0)  # how many
VIEWS = tl.constexpr(1)
STUDENT_SCALE = tl.constexpr(2)
TEACHER_SCALE = tl.constexpr(3)
CAP = tl.constexpr(4)  # 0: none
SHARE = tl.constexpr(5)  # of TAID's mixture of logits; 1: none
STANDARDIZE = tl.constexpr(6)
SMOOTHING = tl.constexpr(7)
Z_LOSS = tl.constexpr(8)
TAKEN_AT = tl.constexpr(9)  # temperature that entries of a top-k teacher are multiplied with
OWN_WEIGHT = tl.constexpr(10)  # columns of what each row has of its own, or -1
OWN_TEMPERATURE = tl.constexpr(11)
HEADER = tl.constexpr(12)
# A teacher.
WEIGHT = tl.constexpr(0)
INNER = tl.constexpr(1)  # three: see ``laid_out`` in kdkernels/backends/native.py
TEACHER_SIZE = tl.constexpr(4)
# How a pass reads the teachers.
NO_TEACHER = tl.constexpr(0)
EACH = tl.constexpr(1)
MEAN_OF_PROBABILITIES = tl.constexpr(2)
MEAN_OF_LOGITS = tl.constexpr(3)

NO_CLASS = tl.constexpr(2**31 - 1)


class Source(NamedTuple):
    """Where the rows come from: pointers, None where there is no such thing."""

    student: Any
    teachers: Any  # a tuple
    known: Any  # values of a top-k teacher, [rows, k]
    indices: Any
    student_bias: Any
    teacher_bias: Any
    k: Any
    table: Any
    of_teachers: Any  # their part of the table
    teacher_count: Any
    inner: Any  # of the student's rows, three
    outer: Any
    step: Any
    row: Any
    classes: Any


class Scratch(NamedTuple):
    """Rows of a program in global memory, float64."""

    student: Any
    teacher: Any
    v: Any  # q df/dq of a pass; another teacher's logits before it
    grad: Any
    kept: Any  # scalars that would cost registers from one pass to the next, as below


# Of Scratch.kept: the cross entropies of the label at temperature 1, the student's Spread, and what
# the terms of a pass come to: their value, and what they add to the gradient beside v.
CE_OF_STUDENT = tl.constexpr(0)
CE_OF_TEACHER = tl.constexpr(1)
ORIGIN = tl.constexpr(2)
MEAN = tl.constexpr(3)
DEVIATION = tl.constexpr(4)
DIVISOR = tl.constexpr(5)
DEGREES = tl.constexpr(6)
VALUE = tl.constexpr(7)
TIMES_Q = tl.constexpr(8)
AT_HOLE = tl.constexpr(9)
REST = tl.constexpr(10)  # of the student's Stats
KEPT = tl.constexpr(16)


class Stats(NamedTuple):
    """What the softmax of a row comes to: scalars."""

    top: Any  # the largest logit; 0 where no class has mass
    at: Any  # the first class that has it
    rest: Any  # the others' exponentials, relative to that: a confident row keeps their digits
    log: Any  # of 1 + rest
    none: Any  # no class has mass


class Spread(NamedTuple):
    """Mean and standard deviation of the logits that are not masked."""

    origin: Any  # one of the logits: their offset is nobody's rounding error
    mean: Any  # relative to that
    deviation: Any
    divisor: Any
    degrees: Any


@triton.jit
def _log1p(x):
    """log(1 + x) to the last digits of a small x."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0, to the last digits of a small x."""
    u = tl.exp(x)
    small = tl.where((u == 1) | (u == 0), 0.5, u)
    return tl.where(u == 1, x, tl.where(u == 0, -1.0, (u - 1) * x / tl.log(small)))


@triton.jit
def _inside(x, bias, columns, mask, scale):
    if bias is not None:
        x += tl.load(bias + columns, mask=mask, other=0.0)
    return x * scale


@triton.jit
def _effective(x, bias, columns, mask, scale, cap):
    """cap · tanh(scale · (x + bias) / cap); without a cap the inside of it."""
    x = _inside(x, bias, columns, mask, scale)
    if cap > 0:
        e = tl.exp(tl.abs(x) * (-2 / cap))
        value = cap * (1 - e) / (1 + e)
        # Masked classes stay masked.
        x = tl.where(x == float("-inf"), x, tl.where(x < 0, -value, value))
    return x


@triton.jit
def _slope(x, bias, columns, mask, scale, cap):
    """The derivative of the same."""
    result = tl.zeros_like(x) + scale
    if cap > 0:
        e = tl.exp(tl.abs(_inside(x, bias, columns, mask, scale)) * (-2 / cap))
        result = 4 * scale * e / ((1 + e) * (1 + e))
    return result


@triton.jit
def _student_row(source):
    return source.student + _starts(source.row, source.inner, source.outer, source.step, True)


@triton.jit
def _load_student(source, scratch, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """The student's effective logits; and no gradient yet."""
    scale, cap = tl.load(source.table + STUDENT_SCALE), tl.load(source.table + CAP)
    student = _student_row(source)
    tl.debug_barrier()
    for first in range(0, source.classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < source.classes
        x = tl.load(student + columns, mask=mask, other=0.0)
        x = _effective(x.to(tl.float64), source.student_bias, columns, mask, scale, cap)
        tl.store(scratch.student + columns, x, mask=mask)
        if GRAD:
            tl.store(scratch.grad + columns, tl.zeros([BLOCK], tl.float64), mask=mask)
    tl.debug_barrier()


@triton.jit
def _stats(row, temperature, hole, only, classes, BLOCK: tl.constexpr):
    """Of a row but for its ``hole``; ``only``: of the classes where that row is +inf, or None."""
    best = tl.full([BLOCK], float("-inf"), tl.float64)
    at = tl.full([BLOCK], NO_CLASS, tl.int32)
    for first in range(0, classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = (columns < classes) & (columns != hole)
        if only is not None:
            mask = mask & (tl.load(only + columns, mask=mask, other=0.0) == float("inf"))
        x = tl.load(row + columns, mask=mask, other=float("-inf"))
        better = x > best
        best, at = tl.where(better, x, best), tl.where(better, columns, at)
    top = tl.max(best, 0)
    at_top = tl.min(tl.where(best == top, at, NO_CLASS), 0)
    none = top == float("-inf")
    reference = tl.where(none, 0.0, top)
    others = tl.zeros([BLOCK], tl.float64)
    for first in range(0, classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = (columns < classes) & (columns != hole)
        if only is not None:
            mask = mask & (tl.load(only + columns, mask=mask, other=0.0) == float("inf"))
        x = tl.load(row + columns, mask=mask, other=float("-inf"))
        # A NaN is no maximum, and comes in here.
        others += tl.where(columns == at_top, 0.0, tl.exp((x - reference) / temperature))
    rest = tl.where(top < float("inf"), tl.sum(others, 0), float("nan"))
    return Stats(reference, at_top, rest, _log1p(rest), none)


@triton.jit
def _spread(row, classes, BLOCK: tl.constexpr):
    best = tl.full([BLOCK], float("-inf"), tl.float64)
    for first in range(0, classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < classes, other=float("-inf"))
        best = tl.where(x > best, x, best)
    top = tl.max(best, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)
    total, counts = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < classes, other=float("-inf"))
        masked = x == float("-inf")
        total += tl.where(masked, 0.0, x - origin)
        counts += tl.where(masked, 0.0, 1.0)
    count = tl.sum(counts, 0)
    mean = tl.sum(total, 0) / tl.where(count > 0, count, 1.0)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < classes, other=float("-inf"))
        centred = tl.where(x == float("-inf"), 0.0, x - origin - mean)
        total += centred * centred
    degrees = tl.where(count > 1, count - 1, 1.0)
    deviation = tl.sqrt(tl.sum(total, 0) / degrees)
    return Spread(origin, mean, deviation, deviation + 1e-7, degrees)


@triton.jit
def _keep_spread(scratch, classes, BLOCK: tl.constexpr):
    spread = _spread(scratch.student, classes, BLOCK)
    tl.store(scratch.kept + ORIGIN, spread.origin)
    tl.store(scratch.kept + MEAN, spread.mean)
    tl.store(scratch.kept + DEVIATION, spread.deviation)
    tl.store(scratch.kept + DIVISOR, spread.divisor)
    tl.store(scratch.kept + DEGREES, spread.degrees)
    tl.debug_barrier()


# ---- teachers ------------------------------------------------------------------------------------


@triton.jit
def _load_top_k(source, out, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """The known entries where they belong. All others have no mass; with a tail they are +inf."""
    other = float("inf") if TAIL else float("-inf")
    tl.debug_barrier()
    for first in range(0, source.classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        nothing = tl.full([BLOCK], other, tl.float64)
        tl.store(out + columns, nothing, mask=columns < source.classes)
    tl.debug_barrier()
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(0, source.k, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        mask = entries < source.k
        at = tl.load(source.indices + source.row * source.k + entries, mask=mask, other=0)
        value = tl.load(source.known + source.row * source.k + entries, mask=mask, other=0.0)
        value = value.to(tl.float64) * tl.load(source.table + TAKEN_AT)
        value = tl.where(value == float("inf"), float("nan"), value)
        fits = (at >= 0) & (at < source.classes)
        tl.store(out + at, value, mask=mask & fits)
        wrong += (mask & ~fits).to(tl.int32)
    tl.debug_barrier()
    if tl.max(wrong, 0) > 0:
        tl.store(out, tl.full([], float("nan"), tl.float64))
        tl.debug_barrier()


@triton.jit
def _load_teacher(source, scratch, k, out, BLOCK: tl.constexpr):
    """A teacher's effective logits; TAID's, between the student's and those."""
    scale, cap = tl.load(source.table + TEACHER_SCALE), tl.load(source.table + CAP)
    share = tl.load(source.table + SHARE)
    numbers = source.of_teachers + k * TEACHER_SIZE + INNER
    inner, outer = tl.load(numbers).to(tl.int64), tl.load(numbers + 1).to(tl.int64)
    start = _starts(source.row, inner, outer, tl.load(numbers + 2).to(tl.int64), True)
    tl.debug_barrier()
    for i in tl.static_range(len(source.teachers)):
        if k == i:
            for first in range(0, source.classes, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                mask = columns < source.classes
                x = tl.load(source.teachers[i] + start + columns, mask=mask, other=0.0)
                x = _effective(x.to(tl.float64), source.teacher_bias, columns, mask, scale, cap)
                if share < 1:
                    s = tl.load(scratch.student + columns, mask=mask, other=0.0)
                    x = tl.where(share == 0, s, (1 - share) * s + share * x)
                tl.store(out + columns, x, mask=mask)
    tl.debug_barrier()


@triton.jit
def _log_of_sum(a, b):
    """log(e^a + e^b)."""
    larger, smaller = tl.where(a > b, a, b), tl.where(a > b, b, a)
    # Both masked; a NaN is the smaller, whatever the other is.
    both = larger == float("-inf")
    return tl.where(both, smaller, larger + tl.log(1 + tl.exp(smaller - larger)))


@triton.jit
def _add_to_mean(scratch, k, of_logits, factor, less, classes, BLOCK: tl.constexpr):
    """Teacher k, which lies in v, into the mean: of logits, or the logarithm of that of
    probabilities."""
    tl.debug_barrier()
    for first in range(0, classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < classes
        x = tl.load(scratch.v + columns, mask=mask, other=0.0) * factor - less
        if k > 0:
            old = tl.load(scratch.teacher + columns, mask=mask, other=0.0)
            if of_logits:
                x += old
            else:
                x = _log_of_sum(old, x)
        tl.store(scratch.teacher + columns, x, mask=mask)
    tl.debug_barrier()


@triton.jit
def _mean_teacher(source, scratch, reads, temperature, standardized, BLOCK: tl.constexpr):
    of_logits = reads == MEAN_OF_LOGITS
    for k in range(0, source.teacher_count):
        _load_teacher(source, scratch, k, scratch.v, BLOCK)
        weight = tl.load(source.of_teachers + k * TEACHER_SIZE + WEIGHT)
        factor, less = weight, weight * 0
        if reads == MEAN_OF_PROBABILITIES:
            own = temperature
            if standardized:
                own = temperature * _spread(scratch.v, source.classes, BLOCK).divisor
            found = _stats(scratch.v, own, -1, None, source.classes, BLOCK)
            # Without any class it is no distribution.
            log = tl.where(found.none, float("nan"), found.log)
            factor, less = 1 / own, found.top / own + log - tl.log(weight)
        _add_to_mean(scratch, k, of_logits, factor, less, source.classes, BLOCK)


@triton.jit
def _make_teacher(
    source,
    scratch,
    reads,
    view,
    temperature,
    standardized,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The teacher's row as a pass compares with it; the temperature that it is to be divided by."""
    if source.known is not None:
        _load_top_k(source, scratch.teacher, TAIL, BLOCK)
    elif reads == EACH:
        _load_teacher(source, scratch, view, scratch.teacher, BLOCK)
    else:
        _mean_teacher(source, scratch, reads, temperature, standardized, BLOCK)
    if reads == MEAN_OF_PROBABILITIES:  # is at this temperature, and standardised
        temperature = temperature * 0 + 1
    elif standardized:
        temperature = temperature * _spread(scratch.teacher, source.classes, BLOCK).divisor
    return temperature
