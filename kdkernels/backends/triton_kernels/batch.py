"""The kernels for what all rows share: scales before them, one loss after them, the backward."""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.state import (
    ALPHA,
    EXPONENT_HIGH,
    EXPONENT_LOW,
    GRAD_SCALE,
    HARD_ROWS,
    HARD_SCALE,
    LARGEST,
    NUMBERS,
    PARAMETERS,
    SMOOTHING,
    SOFT_ROWS,
    SOFT_SCALE,
    TEMPERATURE,
    WEIGHT_SUM,
    _any,
    _blend,
    _put,
    _starts,
)
from kdkernels.backends.triton_kernels.sums import (
    _from_bits,
)


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
        size = tl.abs(tl.load(pointer + index, mask=index < end, other=0.0))
        largest = tl.maximum(largest, size)
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


@triton.jit(do_not_specialize=["rows"])
def numbers_kernel(
    scales,
    numbers,  # a tuple of pairs: each number in two float32 parts, as Triton would round it to one
    largest,  # of a row's gradient for a weight of 1, by divergence; none where nobody asks
    weights,  # Terms, [rows] each or None
    rows,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the host knows of a soft term that is more than forward KL, and how large it may be."""
    for i in tl.static_range(len(numbers) // 2):
        number = tl.zeros([], WIDE) + numbers[2 * i] + numbers[2 * i + 1]
        tl.store(scales + NUMBERS + i, number)
    total = tl.zeros([], WIDE)
    for i in tl.static_range(len(largest)):
        weight = tl.zeros([], WIDE) + numbers[2 * (PARAMETERS - NUMBERS + i)]
        weight = tl.abs(weight + numbers[2 * (PARAMETERS - NUMBERS + i) + 1])
        if weights[i] is not None:
            weight = _largest(weights[i], rows, WIDE, BLOCK)
        total += weight * largest[i]
    tl.store(scales + LARGEST, total)


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
        "slope",
    ]
)
def scales_kernel(
    labels,
    weight,
    counts,  # of count_kernel, [2, parts]; None: few enough to be counted here
    num_items,  # [2]; None: the means are of these rows
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
    slope: tl.int64,  # of the soft term: T, or what T² / T is without the T²
    GENERAL: tl.constexpr,
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
        if num_items is not None:
            soft_rows, hard_rows = tl.load(num_items), tl.load(num_items + 1)
        elif labels is not None:
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
    soft_scale = a * _from_bits(slope, WIDE) / soft_rows
    hard_scale = (1 - a) / hard_rows
    grad_scale = one
    if FLOAT16:
        of_soft = soft_scale
        if GENERAL:
            of_soft *= tl.load(scales + LARGEST)
        grad_scale = _float16_scale(of_soft + 2 * hard_scale * max_weight)
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
