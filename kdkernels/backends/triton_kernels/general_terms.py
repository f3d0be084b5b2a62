"""What the general kernel compares: each divergence of a class and its q df/dq, by a number that is
looked at when it runs. The twin of ``compare_class`` in csrc/cpu/top_k.inl.

All of it in log space: log p and log q are the softmaxes' own, and neither underflows.
"""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# KdDivergence of csrc/cpu/problem.h, which ends at ENTROPY_GAP.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
TOTAL_VARIATION = tl.constexpr(5)
ALPHA_DIVERGENCE = tl.constexpr(6)
RENYI = tl.constexpr(7)
DECOUPLED = tl.constexpr(8)
OTHERS = tl.constexpr(9)  # NKD's: a cross entropy, as WSLD's is
WEIGHTED_SOFT = tl.constexpr(10)
CORRELATION = tl.constexpr(11)
TEACHER_LABEL = tl.constexpr(12)
AGREEMENT = tl.constexpr(13)
ENTROPY_GAP = tl.constexpr(14)
LABEL = tl.constexpr(15)  # the cross entropy of the loss
LABEL_BY_TEACHER = tl.constexpr(16)  # NKD's: by the teacher's share of it
METRICS = tl.constexpr(17)

# Further apart than any logits: in the place of an infinite distance, times a probability.
FAR = tl.constexpr(2.0**100)


class View(NamedTuple):
    """A student and a teacher as one pass compares them."""

    scratch: Any
    classes: Any
    n: Any  # the same, and one more for the bucket of a top-k teacher
    hole: Any  # a class that is left out, or -1
    temperature: Any
    teacher_temperature: Any
    student: Any  # Stats
    teacher: Any
    tailed: Any  # the teacher's +inf stand for classes that it says nothing of
    log_tail: Any  # the bucket
    log_rest: Any


class Term(NamedTuple):
    """A term of a pass as it is for this row: scalars."""

    kind: Any
    weight: Any
    a: Any  # parameter
    second: Any
    shift: Any  # of the exponents of powers; of the class of a hard label
    norm: Any  # what v of powers is multiplied with; a hard label's share; a length
    more: Any  # a smoothed label's share of every class; a length
    value: Any  # where it is known before the classes are compared


@triton.jit
def _logs(view, columns, TAIL: tl.constexpr):
    """log p, log q, and which classes the teacher says nothing of."""
    mask = (columns < view.classes) & (columns != view.hole)
    s = tl.load(view.scratch.student + columns, mask=mask, other=float("-inf"))
    t = tl.load(view.scratch.teacher + columns, mask=mask, other=float("-inf"))
    log_q = (s - view.student.top) / view.temperature - view.student.log
    log_p = (t - view.teacher.top) / view.teacher_temperature - view.teacher.log
    unknown = mask & (columns < 0)
    if TAIL:
        unknown = mask & view.tailed & (t == float("inf"))
        bucket = columns == view.classes
        log_p = tl.where(unknown, float("-inf"), tl.where(bucket, view.log_tail, log_p))
        log_q = tl.where(bucket, view.log_rest, log_q)
    return log_p, log_q, unknown


@triton.jit
def _log_mixture(log_p, log_q, share):
    """log(share p + (1 - share) q); exactly log p where both are the same."""
    larger, smaller = tl.where(log_p > log_q, log_p, log_q), tl.where(log_p > log_q, log_q, log_p)
    of_larger = tl.where(log_p > log_q, share, 1 - share)
    mixed = larger + tl.log(of_larger + (1 - of_larger) * tl.exp(smaller - larger))
    return tl.where(log_p == log_q, log_p, mixed)


@triton.jit
def _exponent(kind, a, log_p, log_q):
    """Of p^a q^(1 - a), or of p q."""
    no_p, no_q = log_p == float("-inf"), log_q == float("-inf")
    of_p, of_q = a, 1 - a
    if kind == AGREEMENT:
        of_p, of_q = a * 0 + 1, a * 0 + 1
    without_p = tl.where(of_p < 0, float("inf"), float("-inf"))
    without_q = tl.where(of_q < 0, float("inf"), float("-inf"))
    exponent = of_p * tl.where(no_p, 0.0, log_p) + of_q * tl.where(no_q, 0.0, log_q)
    exponent = tl.where(no_p, without_p, tl.where(no_q, without_q, exponent))
    return tl.where(no_p & no_q, float("-inf"), exponent)


@triton.jit
def _of_powers(term, log_p, log_q):
    exponent = _exponent(term.kind, term.a, log_p, log_q)
    infinite = exponent == float("inf")
    f = tl.exp(tl.where(infinite, float("-inf"), exponent) - term.shift)
    return tl.where(infinite, float("inf"), f), -term.norm * f


@triton.jit
def _of_mixture(term, log_p, log_q):
    """JSD and the skewed divergences, by log(p / m) and log(q / m)."""
    no_p, no_q = log_p == float("-inf"), log_q == float("-inf")
    p, q, a = tl.exp(log_p), tl.exp(log_q), term.a
    share = a
    if term.kind == SKEW_REVERSE_KL:
        share = 1 - a
    m = _log_mixture(log_p, log_q, share)
    of_p = tl.where(no_p, 0.0, log_p - m)
    of_q = tl.where(no_q, 0.0, log_q - m)
    f, v = p * of_p, tl.where(no_p | no_q, 0.0, -(1 - a) * tl.exp(log_p + log_q - m))
    if term.kind == JSD:
        v = (1 - a) * q * of_q
        f = a * f + v
    elif term.kind == SKEW_REVERSE_KL:
        f, v = q * of_q, tl.where(no_q, 0.0, q * (of_q + 1 - a * tl.exp(log_q - m)))
    return f, v


@triton.jit
def _of_kl(term, log_p, log_q):
    """KL in both directions and what is like them."""
    no_p, no_q = log_p == float("-inf"), log_q == float("-inf")
    p, q = tl.exp(log_p), tl.exp(log_q)
    f, v = tl.zeros_like(p), -p
    if term.kind == TOTAL_VARIATION:
        f = tl.abs(p - q) / 2
        v = tl.where(log_q > log_p, q / 2, tl.where(log_q < log_p, -q / 2, q * 0))
    elif term.kind == REVERSE_KL:
        distance = tl.where(no_q, 0.0, tl.where(no_p, FAR, log_q - log_p))
        f = tl.where(no_p & ~no_q, float("inf"), q * distance)
        v = tl.where(no_q, 0.0, q * (distance + 1))
    elif term.kind == ENTROPY_GAP:
        v = term.norm * q * tl.where(no_q, 0.0, log_q)
    else:
        distance = log_q
        if (term.kind == FORWARD_KL) | (term.kind == DECOUPLED):
            distance = log_q - tl.where(no_p, 0.0, log_p)
        f = tl.where(no_p, 0.0, tl.where(no_q, float("inf"), -p * distance))
    return f, v


@triton.jit
def _of_correlation(term, log_p, log_q):
    mean = term.shift
    a, b = (tl.exp(log_p) - mean) * term.norm, (tl.exp(log_q) - mean) * term.more
    return (b - a) * (b - a) / 2, tl.exp(log_q) * term.more * ((b - a) - b * term.value)


@triton.jit
def _of_label(term, log_q, columns, class_weight, inside):
    """-Σ target log q: of a hard label, or one that is smoothed and weighted."""
    target = tl.where(columns == term.shift, term.norm, tl.zeros_like(log_q))
    if term.more != 0:
        w = tl.full(columns.shape, 1.0, tl.float64)
        if class_weight is not None:
            w = tl.load(class_weight + columns, mask=inside, other=0.0)
        target += term.more * w
    return tl.where(target == 0, 0.0, -target * log_q), -target


@triton.jit
def _compare(term, log_p, log_q, columns, class_weight, inside):
    """f(p, q) and q df/dq of classes."""
    kind = term.kind
    f, v = tl.zeros_like(log_q), tl.zeros_like(log_q)
    if (kind == TEACHER_LABEL) | (kind == LABEL) | (kind == LABEL_BY_TEACHER):
        f, v = _of_label(term, log_q, columns, class_weight, inside)
    elif (kind == ALPHA_DIVERGENCE) | (kind == RENYI) | (kind == AGREEMENT):
        f, v = _of_powers(term, log_p, log_q)
    elif (kind == JSD) | (kind == SKEW_FORWARD_KL) | (kind == SKEW_REVERSE_KL):
        f, v = _of_mixture(term, log_p, log_q)
    elif kind == CORRELATION:
        f, v = _of_correlation(term, log_p, log_q)
    else:
        f, v = _of_kl(term, log_p, log_q)
    return f, v


# ---- what a term needs of the row before its classes are compared --------------------------------


@triton.jit
def _largest_exponent(view, term, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    largest = tl.full([BLOCK], float("-inf"), tl.float64)
    for first in range(0, view.n, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        log_p, log_q, unknown = _logs(view, columns, TAIL)
        exponent = _exponent(term.kind, term.a, log_p, log_q)
        use = (columns < view.n) & ~unknown & (exponent > largest)
        use = use & (exponent < float("inf"))
        largest = tl.where(use, exponent, largest)
    top = tl.max(largest, 0)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _three_sums(view, term, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """Of the powers; of -p log p and -q log q; of products of p and q less their means."""
    x, y = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    z = tl.zeros([BLOCK], tl.float64)
    for first in range(0, view.n, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        log_p, log_q, unknown = _logs(view, columns, TAIL)
        use = (columns < view.n) & ~unknown
        if (term.kind == RENYI) | (term.kind == AGREEMENT):
            f, _ = _of_powers(term, log_p, log_q)
            x += tl.where(use, f, 0.0)
        else:
            p, q = tl.exp(log_p), tl.exp(log_q)
            if term.kind == CORRELATION:
                a, b = p - 1.0 / view.classes.to(tl.float64), q - 1.0 / view.classes.to(tl.float64)
                x += tl.where(use, a * a, 0.0)
                y += tl.where(use, b * b, 0.0)
                z += tl.where(use, a * b, 0.0)
            else:
                x -= tl.where(use & (log_p != float("-inf")), p * log_p, 0.0)
                y -= tl.where(use & (log_q != float("-inf")), q * log_q, 0.0)
    return tl.sum(x, 0), tl.sum(y, 0), tl.sum(z, 0)


@triton.jit
def _prepare_powers(view, term, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """Distributions far apart have no power beside 1: relative to the largest of them."""
    shift = _largest_exponent(view, term, TAIL, BLOCK)
    term = Term(term.kind, term.weight, term.a, term.second, shift, term.norm, shift, term.value)
    total, _, _ = _three_sums(view, term, TAIL, BLOCK)
    value = -(tl.log(total) + shift)
    if term.kind == RENYI:
        value = value / (1 - term.a)
    gone = (total == 0) | (total == float("inf"))
    return shift, tl.where(gone, 0.0, 1 / total), value


@triton.jit
def _prepare_correlation(view, term, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    p, q, both = _three_sums(view, term, TAIL, BLOCK)
    constant = (p <= 1e-24) | (q <= 1e-24)
    of_p = tl.where(constant, 0.0, 1 / tl.sqrt(p))
    of_q = tl.where(constant, 0.0, 1 / tl.sqrt(q))
    return 1.0 / view.classes.to(tl.float64), of_p, of_q, 1 - both * of_p * of_q


@triton.jit
def _prepare(
    view,
    kind,
    weight,
    a,
    second,
    label,
    class_weight,
    smoothing,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A term with what it has to know of the whole row."""
    zero = weight * 0
    shift, norm, more, value = zero, zero, zero, zero
    term = Term(kind, weight, a, second, shift, norm, more, value)
    if (kind == RENYI) | (kind == AGREEMENT):
        shift, norm, value = _prepare_powers(view, term, TAIL, BLOCK)
    elif kind == ALPHA_DIVERGENCE:
        norm = 1 / a
    elif kind == CORRELATION:
        shift, norm, more, value = _prepare_correlation(view, term, TAIL, BLOCK)
    elif (kind == ENTROPY_GAP) | (kind == METRICS):
        of_p, of_q, _ = _three_sums(view, term, TAIL, BLOCK)
        value = (of_p - of_q) * (of_p - of_q)
        norm, shift, more = 2 * (of_p - of_q), of_p, of_q
    elif kind == TEACHER_LABEL:
        shift, norm = view.teacher.at.to(tl.float64), zero + 1 + view.teacher.log * 0
    elif (kind == LABEL) | (kind == LABEL_BY_TEACHER):
        shift, norm = label.to(tl.float64), zero + 1
        if kind == LABEL:
            w = zero + 1
            if class_weight is not None:
                w = tl.load(class_weight + label)
            norm = (1 - smoothing) * w
            more = smoothing / view.classes.to(tl.float64)
    return Term(kind, weight, a, second, shift, norm, more, value)


@triton.jit
def _value(view, term, total):
    """Of a term, from the sum over the classes."""
    kind = term.kind
    value = total
    if (kind == RENYI) | (kind == AGREEMENT) | (kind == ENTROPY_GAP):
        value = term.value
    elif kind == ALPHA_DIVERGENCE:
        value = (total - 1) / (term.a * (term.a - 1))
    elif kind == CORRELATION:
        value = tl.where(term.norm == 0, 1.0, total)  # of a constant row
    # Rounding. With no tail p adds up to less than 1, and what is left may be negative.
    divergence = (kind <= DECOUPLED) | (kind == CORRELATION)
    whole = (view.n > view.classes) | ~view.tailed
    return tl.where(divergence & whole & (value < 0), 0.0, value)
