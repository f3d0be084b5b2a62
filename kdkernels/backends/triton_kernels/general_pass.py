"""One pass of the general kernel: what its terms add up to, and its part of the gradient.

The twin of ``csrc/cuda/compared.cuh``.
"""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.general_rows import (
    AT_HOLE,
    CE_OF_STUDENT,
    CE_OF_TEACHER,
    DEGREES,
    DEVIATION,
    DIVISOR,
    MEAN,
    ORIGIN,
    REST,
    SMOOTHING,
    TIMES_Q,
    VALUE,
    Z_LOSS,
    _expm1,
    _log1p,
)
from kdkernels.backends.triton_kernels.general_terms import (
    ALPHA_DIVERGENCE,
    CORRELATION,
    DECOUPLED,
    FORWARD_KL,
    JSD,
    LABEL,
    LABEL_BY_TEACHER,
    METRICS,
    OTHERS,
    RENYI,
    REVERSE_KL,
    SKEW_FORWARD_KL,
    SKEW_REVERSE_KL,
    WEIGHTED_SOFT,
    _compare,
    _logs,
    _prepare,
    _value,
)

# A term.
KIND = tl.constexpr(0)
TERM_WEIGHT = tl.constexpr(1)
PARAMETER = tl.constexpr(2)
SECOND = tl.constexpr(3)
WEIGHT_COLUMN = tl.constexpr(4)  # of what each row has of its own, or -1
PARAMETER_COLUMN = tl.constexpr(5)
TERM_SIZE = tl.constexpr(6)


class Row(NamedTuple):
    """What all passes of a row share: scalars and pointers."""

    number: Any
    rows: Any
    own: Any  # [columns, rows], or None
    label: Any  # 0 if there is none
    hard: Any  # there is one
    wrong: Any  # it is out of range
    class_weight: Any
    scales: Any
    metrics: Any
    totals: Any  # of this row: SOFT, HARD and ADDED, a column each


@triton.jit
def _of_row(row, column, otherwise):
    result = otherwise
    if row.own is not None:
        if column >= 0:
            result = tl.load(row.own + column.to(tl.int64) * row.rows + row.number)
    return result


@triton.jit
def _softplus(x):
    return _log1p(tl.exp(-tl.abs(x))) + tl.where(x > 0, x, 0.0)


# ---- the terms of a pass -------------------------------------------------------------------------


@triton.jit
def _kind_of(kind, weight, a):
    """Parameters at their ends make a divergence another one, or nothing."""
    powers = (kind == ALPHA_DIVERGENCE) | (kind == RENYI)
    skewed = (kind == SKEW_FORWARD_KL) | (kind == SKEW_REVERSE_KL)
    forward = (kind == JSD) | (kind == SKEW_FORWARD_KL)
    at_0 = tl.where(forward, FORWARD_KL, REVERSE_KL)
    at_1 = tl.where(kind == JSD, REVERSE_KL, FORWARD_KL)
    weight = tl.where(skewed & (a == 1), 0.0, weight)
    ends = (kind == JSD) | powers | skewed
    result = tl.where(ends & (a == 0), at_0, tl.where(ends & (a == 1), at_1, kind))
    return result, weight


@triton.jit
def _sum_term(view, term, begun, class_weight, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """f over the classes, and v added to what there is of it."""
    total = tl.zeros([BLOCK], tl.float64)
    tl.debug_barrier()
    for first in range(0, view.n, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < view.n
        log_p, log_q, unknown = _logs(view, columns, TAIL)
        inside = (columns < view.classes) & mask
        f, v = _compare(term, log_p, log_q, columns, class_weight, inside)
        use = mask & ~unknown & (columns != view.hole)
        total += tl.where(use, f, 0.0)
        old = tl.load(view.scratch.v + columns, mask=mask & begun, other=0.0)
        tl.store(view.scratch.v + columns, old + tl.where(use, term.weight * v, 0.0), mask=mask)
    tl.debug_barrier()
    return tl.sum(total, 0)


@triton.jit
def _odds(logits, stats, temperature, label):
    """log q and log(1 - q) of the label: by its log-odds, or 1 - q would have lost its digits."""
    z = (tl.load(logits + label) - stats.top) / temperature - stats.log
    z = tl.where(stats.none, z + float("inf"), z)
    return -_softplus(-z), -_softplus(z)


@triton.jit
def _part(log_p, log_q):
    """p (log p - log q)."""
    return tl.where(log_p == float("-inf"), 0.0, tl.exp(log_p) * (log_p - log_q))


@triton.jit
def _decouple(view, a, label):
    """The label's part of decoupled distillation: its value, and its entry of the gradient."""
    log_q, log_no_q = _odds(view.scratch.student, view.student, view.temperature, label)
    log_p, log_no_p = _odds(view.scratch.teacher, view.teacher, view.teacher_temperature, label)
    q, p = tl.exp(log_q), tl.exp(log_p)
    # Of the two differences the one that does not cancel.
    more = tl.where(q > 0.5, tl.exp(log_no_p) - tl.exp(log_no_q), q - p)
    target = _part(log_p, log_q) + _part(log_no_p, log_no_q)
    target = tl.where(target < 0, 0.0, target)  # rounding
    # A term of weight zero is no part of the loss.
    return tl.where(a == 0, 0.0, a * target), tl.where(a == 0, 0.0, a * more)


@triton.jit
def _add_to(pointer, value):
    tl.store(pointer, tl.load(pointer) + value)


@triton.jit
def _weight_of_others(kind, weight, a, second, kept):
    """Of what is compared class by class, which is not all of some terms."""
    if (kind == CORRELATION) | (kind == OTHERS):
        weight = weight * a
    elif kind == WEIGHTED_SOFT:
        ratio = tl.load(kept + CE_OF_STUDENT) / (tl.load(kept + CE_OF_TEACHER) + 1e-7)
        weight = weight * a * -_expm1(-tl.where(ratio < 0, 0.0, ratio))
    elif kind == LABEL_BY_TEACHER:
        weight = weight * tl.exp(-tl.load(kept + CE_OF_TEACHER))
    elif kind == DECOUPLED:
        weight = weight * second
    return weight


@triton.jit
def _put_metrics(row, view, term):
    if row.metrics is not None:
        out = row.metrics + row.number * 4
        tl.store(out, term.more)
        tl.store(out + 1, term.shift)
        tl.store(out + 2, (view.student.at == view.teacher.at).to(tl.float64))
        tl.store(out + 3, ((view.student.at == row.label) & row.hard).to(tl.float64))


@triton.jit
def _add_term(view, at, begun, row, table, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """One term of a pass."""
    kind = tl.load(at + KIND).to(tl.int32)
    weight = _of_row(row, tl.load(at + WEIGHT_COLUMN).to(tl.int32), tl.load(at + TERM_WEIGHT))
    a = _of_row(row, tl.load(at + PARAMETER_COLUMN).to(tl.int32), tl.load(at + PARAMETER))
    second = tl.load(at + SECOND)
    kind, weight = _kind_of(kind, weight, a)
    of_others = _weight_of_others(kind, weight, a, second, view.scratch.kept)
    kept = view.scratch.kept
    if of_others != 0:
        smoothing = tl.load(table + SMOOTHING)
        term = _prepare(
            view, kind, of_others, a, second, row.label, row.class_weight, smoothing, TAIL, BLOCK
        )
        if kind == METRICS:
            _put_metrics(row, view, term)
        else:
            total = _sum_term(view, term, begun, row.class_weight, TAIL, BLOCK)
            begun = begun | (of_others != 0)
            _add_to(kept + VALUE, of_others * _value(view, term, total))
    if (kind == DECOUPLED) & (weight != 0):
        of_label, more = _decouple(view, a, row.label)
        _add_to(kept + VALUE, weight * of_label)
        _add_to(kept + AT_HOLE, weight * more)
        _add_to(kept + TIMES_Q, -weight * more)
    if kind == LABEL:
        z_loss, log_sum = tl.load(table + Z_LOSS), view.student.top + view.student.log
        if z_loss != 0:
            _add_to(kept + VALUE, z_loss * log_sum * log_sum)
            _add_to(kept + TIMES_Q, 2 * z_loss * log_sum)
    return begun


# ---- the gradient of a pass ----------------------------------------------------------------------


class Sums(NamedTuple):
    """Of v and q: scalars."""

    at_sure: Any  # the class that the student is sure of
    others: Any
    known: Any
    known_q: Any
    bucket: Any


@triton.jit
def _sums_of_v(view, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    at_sure, others = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    known, known_q = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    bucket = tl.zeros([BLOCK], tl.float64)
    for first in range(0, view.n, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        v = tl.load(view.scratch.v + columns, mask=columns < view.n, other=0.0)
        sure = columns == view.student.at
        at_sure += tl.where(sure, v, 0.0)
        others += tl.where(sure, 0.0, v)
        if TAIL:
            _, log_q, unknown = _logs(view, columns, TAIL)
            is_known = (columns < view.classes) & ~unknown
            known += tl.where(is_known, v, 0.0)
            known_q += tl.where(is_known, tl.exp(log_q), 0.0)
            bucket += tl.where(columns == view.classes, v, 0.0)
    return Sums(
        tl.sum(at_sure, 0),
        tl.sum(others, 0),
        tl.sum(known, 0),
        tl.sum(known_q, 0),
        tl.sum(bucket, 0),
    )


@triton.jit
def _centred(view, columns, mask):
    """The student's logits less their mean; 0 for masked ones."""
    kept = view.scratch.kept
    s = tl.load(view.scratch.student + columns, mask=mask, other=float("-inf"))
    return tl.where(s == float("-inf"), 0.0, s - tl.load(kept + ORIGIN) - tl.load(kept + MEAN))


@triton.jit
def _add_gradient(view, factor, standardized, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """factor · (v - q Σ v), and what there is beside v."""
    tl.debug_barrier()
    sums = _sums_of_v(view, TAIL, BLOCK)
    # Where q is nearly 1, both are summed over all other classes instead.
    kept = view.scratch.kept
    rest = tl.load(kept + REST)
    at_sure = sums.at_sure * (rest / (1 + rest)) - sums.others / (1 + rest)
    times_q, at_hole = tl.load(kept + TIMES_Q), tl.load(kept + AT_HOLE)
    mean = sums.at_sure + sums.others
    # df/dq of the classes without a teacher less the mean, of which it may be nearly all.
    log_rest = tl.where(view.log_rest == float("-inf"), 0.0, view.log_rest)
    below = sums.bucket * tl.exp(-log_rest) * sums.known_q - sums.known
    dots = tl.zeros([BLOCK], tl.float64)
    tl.debug_barrier()
    for first in range(0, view.classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < view.classes
        _, log_q, unknown = _logs(view, columns, TAIL)
        q = tl.exp(log_q)
        g = tl.load(view.scratch.v + columns, mask=mask, other=0.0) - q * mean
        g = tl.where(columns == view.student.at, at_sure, g)
        if TAIL:
            g = tl.where(unknown, q * below, g)
        g = factor * (g + times_q * q + tl.where(columns == view.hole, at_hole, 0.0))
        old = tl.load(view.scratch.grad + columns, mask=mask, other=0.0)
        tl.store(view.scratch.grad + columns, old + g, mask=mask)
        if standardized:
            dots += g * _centred(view, columns, mask)
    tl.debug_barrier()
    # A standardised row has a temperature of its own, which its logits change, too.
    if standardized & (tl.load(kept + DEVIATION) != 0):
        slope = tl.sum(dots, 0) / (tl.load(kept + DIVISOR) * tl.load(kept + DEVIATION))
        slope = slope / tl.load(kept + DEGREES)
        for first in range(0, view.classes, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            mask = columns < view.classes
            old = tl.load(view.scratch.grad + columns, mask=mask, other=0.0)
            old -= slope * _centred(view, columns, mask)
            tl.store(view.scratch.grad + columns, old, mask=mask)
        tl.debug_barrier()
