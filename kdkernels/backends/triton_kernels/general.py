"""The general kernel: every objective by one skeleton, in float64.

A row is looked at in passes: of each temperature, of each teacher that is compared by itself, of
terms at temperatures of their own, of the cross entropy. A pass adds its terms' q df/dq up in v,
from which its part of the gradient follows: (v - q Σ v) / T. What the passes are is read from a
table of numbers when the kernel runs. A program serves rows in turn, with the same scratch.
"""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.general_pass import (
    TERM_SIZE,
    Row,
    _add_gradient,
    _add_term,
    _add_to,
    _of_row,
)
from kdkernels.backends.triton_kernels.general_rows import (
    AT_HOLE,
    CAP,
    CE_OF_STUDENT,
    CE_OF_TEACHER,
    DIVISOR,
    EACH,
    HEADER,
    KEPT,
    NO_TEACHER,
    OWN_TEMPERATURE,
    OWN_WEIGHT,
    PASSES,
    REST,
    STANDARDIZE,
    STUDENT_SCALE,
    TEACHER_SIZE,
    TIMES_Q,
    VALUE,
    VIEWS,
    WEIGHT,
    Scratch,
    Source,
    Stats,
    _keep_spread,
    _load_student,
    _log1p,
    _make_teacher,
    _slope,
    _stats,
    _student_row,
)
from kdkernels.backends.triton_kernels.general_terms import View
from kdkernels.backends.triton_kernels.state import _starts

# A pass in the table.
TERM_OF = tl.constexpr(0)  # of the loss: SOFT, HARD, ADDED, or none
TEMPERATURE = tl.constexpr(1)
TEACHER_TEMPERATURE = tl.constexpr(2)  # 0: the same
PASS_SHARE = tl.constexpr(3)
AT_ONE = tl.constexpr(4)  # not at the row's own temperature, not standardised, not times T²
SQUARED = tl.constexpr(5)
READS = tl.constexpr(6)
PASS_VIEWS = tl.constexpr(7)
HOLE = tl.constexpr(8)  # the label is left out
LABELLED = tl.constexpr(9)  # a label out of range makes the term NaN
FIRST = tl.constexpr(10)  # term
TERMS = tl.constexpr(11)
PASS_SIZE = tl.constexpr(12)
SOFT = tl.constexpr(0)
HARD = tl.constexpr(1)
ADDED = tl.constexpr(2)
NOTHING = tl.constexpr(3)


# ---- passes --------------------------------------------------------------------------------------


@triton.jit
def _log_tail(row, classes, BLOCK: tl.constexpr):
    """log of what the known classes of a top-k teacher leave."""
    mass = tl.zeros([BLOCK], tl.float64)
    for first in range(0, classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < classes, other=float("inf"))
        mass += tl.where(x == float("inf"), 0.0, tl.exp(x))
    known = tl.sum(mass, 0)
    # Rounding may leave a little more than 1; what remains is then nothing.
    return tl.where(known >= 1, float("-inf"), _log1p(-tl.where(known >= 1, 0.0, known)))


@triton.jit
def _log_rest(scratch, student, temperature, classes, BLOCK: tl.constexpr):
    """log q of all classes that a top-k teacher says nothing of."""
    others = _stats(scratch.student, temperature, -1, scratch.teacher, classes, BLOCK)
    result = (others.top - student.top) / temperature - student.log + others.log
    return tl.where(others.none & (student.log == student.log), float("-inf"), result)


@triton.jit
def _distribution(row, temperature, hole, classes, BLOCK: tl.constexpr):
    stats = _stats(row, temperature, hole, None, classes, BLOCK)
    # Without any class it is none; the label may be all that there is.
    log = tl.where(stats.none & (hole < 0), float("nan"), stats.log)
    return Stats(stats.top, stats.at, stats.rest, log, stats.none)


@triton.jit
def _view(
    source, scratch, temperature, of_teacher, hole, reads, TAIL: tl.constexpr, BLOCK: tl.constexpr
):
    student = _distribution(scratch.student, temperature, hole, source.classes, BLOCK)
    teacher = student
    tailed = reads < 0
    n, log_tail, log_rest = source.classes, temperature * 0, temperature * 0
    if TAIL:
        tailed = reads != NO_TEACHER
        if tailed:
            zero = temperature * 0
            of_teacher = zero + 1  # what is known of it is there as it is
            teacher = Stats(zero, student.at, zero, zero, reads < 0)
            log_rest = _log_rest(scratch, student, temperature, source.classes, BLOCK)
            if TAIL == 1:
                n = n + 1
                log_tail = _log_tail(scratch.teacher, source.classes, BLOCK)
                log_tail = tl.where(source.k == source.classes, float("-inf"), log_tail)
    elif reads != NO_TEACHER:
        teacher = _distribution(scratch.teacher, of_teacher, hole, source.classes, BLOCK)
    return View(
        scratch,
        source.classes,
        n,
        hole,
        temperature,
        of_teacher,
        student,
        teacher,
        tailed,
        log_tail,
        log_rest,
    )


@triton.jit
def _nominal(row, table, at):
    """The temperature of a pass in this row, as it was asked for."""
    result = tl.load(at + TEMPERATURE)
    if tl.load(at + AT_ONE) == 0:
        result = _of_row(row, tl.load(table + OWN_TEMPERATURE).to(tl.int32), result)
    return result


@triton.jit
def _share(source, row, at, view_number):
    """What the terms of a pass are multiplied with in this row."""
    table = source.table
    share = tl.load(at + PASS_SHARE)
    share *= _of_row(row, tl.load(table + OWN_WEIGHT).to(tl.int32), share * 0 + 1)
    if tl.load(at + READS) == EACH:
        if source.teacher_count > 1:
            share *= tl.load(source.of_teachers + view_number * TEACHER_SIZE + WEIGHT)
    if (tl.load(at + LABELLED) != 0) | (tl.load(at + TERM_OF) == HARD):
        share = tl.where(row.wrong, float("nan"), share)
    if tl.load(at + SQUARED) != 0:
        nominal = _nominal(row, table, at)
        share *= nominal * nominal
    return share


@triton.jit
def _clear_v(view, BLOCK: tl.constexpr):
    tl.debug_barrier()
    for first in range(0, view.n, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        none = tl.zeros([BLOCK], tl.float64)
        tl.store(view.scratch.v + columns, none, mask=columns < view.n)
    tl.debug_barrier()


@triton.jit
def _visit_pass(
    source,
    scratch,
    row,
    at,
    view_number,
    terms,
    GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    table = source.table
    kind, reads = tl.load(at + TERM_OF).to(tl.int32), tl.load(at + READS).to(tl.int32)
    at_one, own_teacher = tl.load(at + AT_ONE) != 0, tl.load(at + TEACHER_TEMPERATURE)
    nominal = _nominal(row, table, at)
    of_teacher = tl.where(own_teacher == 0, nominal, own_teacher)
    standardized = (tl.load(table + STANDARDIZE) != 0) & ~at_one
    if reads != NO_TEACHER:
        of_teacher = _make_teacher(
            source, scratch, reads, view_number, of_teacher, standardized, TAIL, BLOCK
        )
    temperature = nominal
    if standardized:
        temperature = nominal * tl.load(scratch.kept + DIVISOR)
    hole = tl.where(tl.load(at + HOLE) != 0, row.label, -1)
    view = _view(source, scratch, temperature, of_teacher, hole, reads, TAIL, BLOCK)
    labelled = tl.load(at + LABELLED) != 0
    if labelled & at_one:
        s, t = tl.load(scratch.student + row.label), tl.load(scratch.teacher + row.label)
        of_label = view.student.log - (s - view.student.top)
        tl.store(scratch.kept + CE_OF_STUDENT, of_label)
        of_label = view.teacher.log - (t - view.teacher.top) / of_teacher
        tl.store(scratch.kept + CE_OF_TEACHER, of_label)
        tl.debug_barrier()

    zero = temperature * 0
    count = tl.load(at + TERMS).to(tl.int32)
    begun = count < 0
    tl.store(scratch.kept + VALUE, zero)
    tl.store(scratch.kept + TIMES_Q, zero)
    tl.store(scratch.kept + AT_HOLE, zero)
    tl.store(scratch.kept + REST, view.student.rest)
    tl.debug_barrier()
    first = terms + tl.load(at + FIRST).to(tl.int32) * TERM_SIZE
    for i in range(0, count):
        begun = _add_term(view, first + i * TERM_SIZE, begun, row, table, TAIL, BLOCK)
    share = _share(source, row, at, view_number)
    if GRAD:
        if kind != NOTHING:
            scale = tl.load(row.scales + kind)
            if (scale != 0) & (count > 0):
                if not begun:  # no term has a weight
                    _clear_v(view, BLOCK)
                factor = scale * share / temperature
                _add_gradient(view, factor, standardized, TAIL, BLOCK)
    if kind != NOTHING:
        _add_to(row.totals + kind * row.rows, tl.load(scratch.kept + VALUE) * share)


@triton.jit
def _visit_row(
    source, scratch, row, terms, GRAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr
):
    table = source.table
    _load_student(source, scratch, GRAD, BLOCK)
    if tl.load(table + STANDARDIZE) != 0:
        _keep_spread(scratch, source.classes, BLOCK)
    passes = tl.load(table + PASSES).to(tl.int32)
    for view in range(0, tl.load(table + VIEWS).to(tl.int32)):
        for i in range(0, passes):
            at = table + HEADER + i * PASS_SIZE
            here = view < tl.load(at + PASS_VIEWS).to(tl.int32)
            if here & ((tl.load(at + TERM_OF) != HARD) | row.hard):
                _visit_pass(source, scratch, row, at, view, terms, GRAD, TAIL, BLOCK)


@triton.jit
def _write_gradient(source, scratch, grad, start, active, BLOCK: tl.constexpr):
    """Of the logits as they came; in place they are read for the last time."""
    scale, cap = tl.load(source.table + STUDENT_SCALE), tl.load(source.table + CAP)
    student = _student_row(source)
    for first in range(0, source.classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < source.classes
        use = mask & active
        g = tl.load(scratch.grad + columns, mask=use, other=0.0)
        x = tl.load(student + columns, mask=use, other=0.0)
        slope = _slope(x.to(tl.float64), source.student_bias, columns, mask, scale, cap)
        g *= slope
        if grad.dtype.element_ty != tl.float64:
            g = g.to(tl.float32)
        tl.store(grad + start + columns, g.to(grad.dtype.element_ty), mask=mask)


NOT_SPECIALIZED = [
    "rows",
    "classes",
    "width",
    "k",
    "count",
    "passes",
    "terms",
    "ignore_index",
    "student_inner",
    "student_outer",
    "student_step",
    "grad_inner",
    "grad_outer",
    "grad_step",
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def general_kernel(
    student,
    teachers,  # a tuple of several; none with a top-k teacher
    values,  # of a top-k teacher, [rows, k], or None
    indices,
    grad,  # None: loss only; may be the student
    labels,  # None: every row active, no cross entropy
    class_weight,
    student_bias,  # [classes], or None
    teacher_bias,
    table,
    scales,  # of the gradients of SOFT, HARD and ADDED
    own,  # [columns, rows]: what each row has of its own, or None
    terms_of_rows,  # [3, rows]: SOFT, HARD and ADDED; zeros
    metrics,  # [rows, 4], or None
    scratch,  # of each program, float64: Scratch
    rows,
    classes,
    width,
    k,
    count,
    passes,
    terms,
    ignore_index: tl.int64,
    student_inner,
    student_outer,
    student_step,
    grad_inner,
    grad_outer,
    grad_step,
    DISTILL_IGNORED: tl.constexpr,
    TAIL: tl.constexpr,  # 0: no class is without a teacher, 1: those are one class, 2: left out
    BLOCK: tl.constexpr,
):
    """The terms of every row, and its gradient."""
    scratch += tl.program_id(0).to(tl.int64) * (4 * width + KEPT)
    memory = Scratch(
        scratch, scratch + width, scratch + 2 * width, scratch + 3 * width, scratch + 4 * width
    )
    at_terms = table + HEADER + passes * PASS_SIZE
    of_teachers = at_terms + terms * TERM_SIZE
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = tl.zeros([], tl.int64) + number
        zero = tl.zeros([], tl.float64)
        label, hard, wrong, active = tl.zeros([], tl.int32), r < 0, r < 0, r >= 0
        if labels is not None:
            given = tl.load(labels + r).to(tl.int64)
            hard = given != ignore_index
            fits = (given >= 0) & (given < classes)
            wrong = hard & ~fits
            label = tl.where(hard & fits, given, 0).to(tl.int32)
            if not DISTILL_IGNORED:
                active = hard
        totals = terms_of_rows + r
        row = Row(r, rows, own, label, hard, wrong, class_weight, scales, metrics, totals)
        weight = _of_row(row, tl.load(table + OWN_WEIGHT).to(tl.int32), zero + 1)
        active = active & (weight != 0)
        source = Source(
            student,
            teachers,
            values,
            indices,
            student_bias,
            teacher_bias,
            k,
            table,
            of_teachers,
            count,
            student_inner,
            student_outer,
            student_step,
            r,
            classes,
        )
        if active:
            _visit_row(source, memory, row, at_terms, grad is not None, TAIL, BLOCK)
        if grad is not None:
            start = _starts(r, grad_inner, grad_outer, grad_step, True)
            _write_gradient(source, memory, grad, start, active, BLOCK)


@triton.jit
def table_kernel(numbers, table, COUNT: tl.constexpr):
    """Writes numbers that come as two float32 each, as Triton would round them to one."""
    for i in tl.static_range(COUNT):
        number = tl.zeros([], tl.float64) + numbers[2 * i] + numbers[2 * i + 1]
        tl.store(table + i, number)
