"""The kernels that visit the rows: one in float32, and one in double for the rows at risk."""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.decoupled import (
    _decouple,
    _decoupled_entries,
    _decoupled_error,
    _decoupled_factors,
)
from kdkernels.backends.triton_kernels.divergences import (
    _mixture_error,
    _mixture_factors,
    _mixture_loss,
    _sweep_between,
    _tile_between,
    _v_again,
)
from kdkernels.backends.triton_kernels.gradient import (
    _entries,
    _factors,
    _gradient,
    _hard_loss,
    _logits_at,
    _loss_at_risk,
    _may_vanish,
    _needed_squares,
    _soft_error,
    _soft_loss,
    _squares,
    _store,
    _weights_at,
)
from kdkernels.backends.triton_kernels.state import (
    ALPHA,
    EXPONENT_HIGH,
    EXPONENT_LOW,
    HARD_SCALE,
    NO_HARD,
    SMOOTHING,
    SOFT_SCALE,
    TEACHER_HIGH,
    TEACHER_LOW,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
    WEIGHT_SUM,
    Batch,
    Tile,
    _blend,
    _put,
    _starts,
)
from kdkernels.backends.triton_kernels.sums import (
    _add,
    _load_both,
    _start,
    _sweep,
    _tile_exponentials,
)


@triton.jit
def _terms(sums, tile, s_label, w, batch, asked):
    soft, hard = sums.student * 0, sums.student * 0
    if asked.soft:
        soft = tl.where(tile.active, _soft_loss(sums, batch), 0.0)
    if asked.power != NO_HARD:
        hard = _hard_loss(sums, tile, w, s_label, batch, asked)
    return soft, hard


@triton.jit
def _conclude(sums, row, between, tile, s_label, w, batch, asked, REAL: tl.constexpr):
    """The two terms, and whether float32 is not good enough for them."""
    if asked.decoupled:
        soft, hard, factor = between.soft, between.hard, between.off
    else:
        soft, hard = _terms(sums, tile, s_label, w, batch, asked)
        factor = batch.temperature * batch.temperature
        if asked.mixture is not None:
            soft, factor = _mixture_loss(sums, between, row, batch, asked)
            soft = tl.where(tile.active, soft, 0.0)
    return soft, hard, tile.active & _loss_at_risk(sums, soft, factor, batch, asked, REAL)


@triton.jit
def _prepare(sums, between, vees, tile, keep, s_label, w, batch, asked):
    """The factors of the gradient, its entries that cancel, and what it has to be in size."""
    if asked.decoupled:
        f = _decoupled_factors(between, sums, w, batch, asked)
        entries = _decoupled_entries(between, sums, f, tile, keep, s_label, batch, asked)
    else:
        f = _factors(sums, tile, w, batch, asked)
        if asked.mixture is not None and asked.soft_grad:
            f = _mixture_factors(f, vees, batch)
        entries = _entries(sums, vees, f, tile, keep, s_label, w, batch, asked)
    error = sums.student * 0
    if asked.soft_grad:
        if asked.decoupled:
            error = _decoupled_error(between, sums, f, entries)
        elif asked.mixture is not None:
            error = _mixture_error(sums, vees, entries.not_q, entries.sure >= 0, batch)
        else:
            error = _soft_error(sums, f, entries, entries.sure >= 0)
    return f, entries, _needed_squares(sums, f, entries, error, tile, asked)


@triton.jit
def _visit_tile(tile, columns, batch, asked, R: tl.constexpr):
    """Rows that one tile holds, in float32: read once."""
    s_label = _logits_at(tile.student, tile.label, tile.hard, tl.float32)
    w = _weights_at(tile.label, tile.hard, batch, asked)
    s, t = _load_both(tile, tile.active, columns, batch, asked, tl.float32)
    sums = _start(s, t, columns, R, batch)
    es, et, e1, difference = _tile_exponentials(s, t, sums, batch, asked)
    sums = _add(sums, s, t, es, et, e1, difference, columns, batch, asked)
    row, between, vees = sums, sums, sums
    if asked.mixture is not None:
        row, between, vees, et = _tile_between(s, t, es, et, sums, columns, tile, batch, asked)
    if asked.decoupled:
        between = _decouple(sums, tile, s_label, w, batch, asked)
    soft, hard, loss_risk = _conclude(
        sums, row, between, tile, s_label, w, batch, asked, tl.float32
    )
    risk = loss_risk
    if asked.grad:
        f, entries, needed = _prepare(
            sums, between, vees, tile, tile.active, s_label, w, batch, asked
        )
        g = _gradient(es, et, e1, f, entries, columns, batch, asked, tl.float32)
        squares = _squares(g, columns, batch)
        vanishes = _may_vanish(sums, tile, asked) & (squares == 0)
        risk = risk | (tile.active & (needed > squares) & ~vanishes)
        # In place, a row that is at risk must not be overwritten before it is swept again.
        _store(tile.grad, g, columns, tile.active, ~risk & (tile.active | tile.idle), batch.classes)
    return soft, hard, loss_risk, risk


@triton.jit
def _gradient_block(
    sums, row, vees, f, entries, tile, keep, columns, batch, asked, REAL: tl.constexpr
):
    s, t = _load_both(tile, keep, columns, batch, asked, REAL)
    es, et, e1, _ = _tile_exponentials(s, t, sums, batch, asked)
    if asked.mixture is not None and asked.soft_grad:
        et = _v_again(s, t, es, et, sums, row, vees, batch, asked)
    return _gradient(es, et, e1, f, entries, columns, batch, asked, REAL)


@triton.jit
def _visit_blocks(tile, batch, asked, REAL: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of any length, block by block: read once for the sums, again for the gradient."""
    s_label = _logits_at(tile.student, tile.label, tile.hard, REAL)
    w = _weights_at(tile.label, tile.hard, batch, asked)
    sums = _sweep(tile, batch, asked, REAL, R, BLOCK)
    row, between, vees = sums, sums, sums
    if asked.mixture is not None:
        row, between, vees = _sweep_between(tile, sums, batch, asked, REAL, BLOCK)
    if asked.decoupled:
        between = _decouple(sums, tile, s_label, w, batch, asked)
    soft, hard, loss_risk = _conclude(sums, row, between, tile, s_label, w, batch, asked, REAL)
    risk = loss_risk
    if asked.grad:
        keep = tile.active & ~risk
        f, entries, needed = _prepare(sums, between, vees, tile, keep, s_label, w, batch, asked)
        may_vanish = _may_vanish(sums, tile, asked)
        judged: tl.constexpr = batch.temperature.dtype != REAL
        squares = tl.zeros([R], batch.temperature.dtype)
        if asked.inplace and judged:
            # Rehearsed, as a row that is at risk must not be overwritten before it is swept again.
            for first in range(0, batch.classes, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                g = _gradient_block(
                    sums, row, vees, f, entries, tile, keep, columns, batch, asked, REAL
                )
                squares += _squares(g, columns, batch)
            risk = risk | (keep & (needed > squares) & ~(may_vanish & (squares == 0)))
            keep = tile.active & ~risk
        for first in range(0, batch.classes, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            g = _gradient_block(
                sums, row, vees, f, entries, tile, keep, columns, batch, asked, REAL
            )
            if judged and not asked.inplace:
                squares += _squares(g, columns, batch)
            _store(tile.grad, g, columns, keep, keep | tile.idle, batch.classes)
        if judged and not asked.inplace:
            risk = risk | (keep & (needed > squares) & ~(may_vanish & (squares == 0)))
    return soft, hard, loss_risk, risk


@triton.jit
def _load_batch(scales, per_row, weight, classes, asked):
    weight_or_any = scales
    if asked.weighted:
        weight_or_any = weight
    temperature = tl.load(scales + TEMPERATURE)
    alpha, smoothing = tl.load(scales + ALPHA), tl.load(scales + SMOOTHING)
    weight_sum = tl.load(scales + WEIGHT_SUM)
    soft_scale, hard_scale = tl.load(scales + SOFT_SCALE), tl.load(scales + HARD_SCALE)
    high = tl.load(scales + EXPONENT_HIGH).to(tl.float32)
    low = tl.load(scales + EXPONENT_LOW).to(tl.float32)
    teacher_temperature, teacher_high, teacher_low = temperature, high, low
    if asked.mixture is not None:
        teacher_temperature = tl.load(scales + TEACHER_TEMPERATURE)
        teacher_high = tl.load(scales + TEACHER_HIGH).to(tl.float32)
        teacher_low = tl.load(scales + TEACHER_LOW).to(tl.float32)
    return Batch(
        temperature,
        alpha,
        smoothing,
        weight_sum,
        soft_scale,
        hard_scale,
        high,
        low,
        weight_or_any,
        classes,
        teacher_temperature,
        teacher_high,
        teacher_low,
        scales,
        per_row,
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
    return Tile(student, teacher, grad_at, active, idle, hard, label.to(tl.int32), bad, row)


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
    per_row,  # Terms, [rows] each or None; None: one mixture for all rows
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
    batch = _load_batch(scales, per_row, weight, classes, asked)
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
    per_row,  # Terms, [rows] each or None; None: one mixture for all rows
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
    batch = _load_batch(scales, per_row, weight, classes, asked)
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
