"""Divergences between p (teacher) and q (student) that need both normalised: a sweep between the
two, which sums the value of each and v = q df/dq over the classes. The gradient of any of them is
(v - q sum v) / T, so that the last sweep needs v where forward KL has the teacher's exponentials.

The twin of ``csrc/cpu/divergences.inl``; what each divergence is, policies.py says.
"""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.gradient import _squared
from kdkernels.backends.triton_kernels.policies import (
    Classes,
    _alpha,
    _forward_kl,
    _jsd,
    _power,
    _reverse_kl,
    _skew_forward_kl,
    _skew_reverse_kl,
    _total_variation,
)
from kdkernels.backends.triton_kernels.state import (
    FACTOR,
    PARAMETERS,
    Factors,
    Terms,
)
from kdkernels.backends.triton_kernels.sums import (
    _below,
    _load_both,
    _tile_exponentials,
    _total,
)

# In the place of -inf: 0 times it is 0, and over T it is still a number.
LOWEST = tl.constexpr(-(2.0**100))


class Row(NamedTuple):
    """What a row's classes have in common, (R,)."""

    to_p: Any  # what the exponentials are multiplied with
    to_q: Any
    constant: Any  # of log(q / p)
    norm: Any  # of the powers, which exponent and distance leave out
    shift: Any  # of their exponents
    terms: Any


class Compared(NamedTuple):
    """Terms of the mixture, (R, BLOCK): those of a policy, weighted and summed.

    ``constant`` is what the row's constant is to be multiplied with and added to the value (rounded
    to float32 in every term it would be off by the same in all). A constant in df/dq drops out of
    the gradient and is left out. ``squares``: of what v may be off by, in roundings.
    """

    value: Any
    v: Any
    constant: Any
    squares: Any


class Between(NamedTuple):
    """Sums over the classes, (R,): all, or all but the student's maximum and that by itself."""

    value: Any
    constant: Any
    v: Any
    v_at: Any
    v_label: Any
    squares: Any
    squares_at: Any
    powers: Any  # Renyi's, under its logarithm: v is to be divided by their sum
    powers_at: Any
    powers_label: Any
    power_squares: Any
    power_squares_at: Any
    lowest: Any  # of the teacher's logits where the student has mass


class Vees(NamedTuple):
    """The same of v once the powers' sum is known."""

    others: Any
    at: Any
    label: Any
    squares: Any
    squares_at: Any
    of_powers: Any  # what a power is multiplied with to make its v


# ---- a row's numbers -----------------------------------------------------------------------------


@triton.jit
def _term(index: tl.constexpr, IS_ASKED: tl.constexpr, tile, batch):
    """A weight or a parameter, one for all or each row's own, (R,)."""
    result = tl.zeros(tile.label.shape, batch.temperature.dtype)
    if IS_ASKED:
        if batch.per_row[index] is not None:
            result = tl.load(batch.per_row[index] + tile.row, mask=tile.active, other=0.0)
        else:
            result += tl.load(batch.scales + PARAMETERS + index)
    return result


@triton.jit
def _load_terms(tile, batch, asked):
    skewed: tl.constexpr = asked.mixture.skew_forward_kl or asked.mixture.skew_reverse_kl
    powers: tl.constexpr = asked.mixture.alpha or asked.mixture.renyi
    return Terms(
        _term(0, asked.mixture.forward_kl, tile, batch),
        _term(1, asked.mixture.reverse_kl, tile, batch),
        _term(2, asked.mixture.jsd, tile, batch),
        _term(3, asked.mixture.skew_forward_kl, tile, batch),
        _term(4, asked.mixture.skew_reverse_kl, tile, batch),
        _term(5, asked.mixture.total_variation, tile, batch),
        _term(6, asked.mixture.alpha, tile, batch),
        _term(7, asked.mixture.renyi, tile, batch),
        _term(8, asked.mixture.jsd, tile, batch),
        _term(9, skewed, tile, batch),
        _term(10, powers, tile, batch),
    )


@triton.jit
def _settle_terms(w):
    """At the ends of its parameter a divergence is another one, or nothing."""
    forward = w.forward_kl + tl.where(w.beta == 0, w.jsd, 0.0)
    forward += tl.where(w.skew == 0, w.skew_forward_kl, 0.0)
    forward += tl.where(w.order == 1, w.alpha + w.renyi, 0.0)
    reverse = w.reverse_kl + tl.where(w.beta == 1, w.jsd, 0.0)
    reverse += tl.where(w.skew == 0, w.skew_reverse_kl, 0.0)
    reverse += tl.where(w.order == 0, w.alpha, 0.0)
    no_skew = (w.skew == 0) | (w.skew == 1)
    no_power = (w.order == 0) | (w.order == 1)
    return Terms(
        forward,
        reverse,
        tl.where((w.beta == 0) | (w.beta == 1), 0.0, w.jsd),
        tl.where(no_skew, 0.0, w.skew_forward_kl),
        tl.where(no_skew, 0.0, w.skew_reverse_kl),
        w.total_variation,
        tl.where(no_power, 0.0, w.alpha),
        tl.where(no_power, 0.0, w.renyi),
        w.beta,
        w.skew,
        w.order,
    )


@triton.jit
def _row(sums, tile, batch, asked):
    terms = _settle_terms(_load_terms(tile, batch, asked))
    student, teacher = sums.student + sums.student_ones, sums.teacher + sums.teacher_ones
    log_s, log_t = tl.log(student), tl.log(teacher)
    norm = tl.exp(-terms.order * log_t - (1 - terms.order) * log_s)
    return Row(1 / teacher, 1 / student, tl.log(teacher / student), norm, student * 0, terms)


# ---- the sweep between ---------------------------------------------------------------------------


@triton.jit
def _classes(s, t, es, et, sums, row, batch):
    ds = tl.maximum(_below(s, sums.student_max[:, None]), LOWEST, tl.PropagateNan.ALL)
    dt = tl.maximum(_below(t, sums.teacher_max[:, None]), LOWEST, tl.PropagateNan.ALL)
    inverse = (1 / batch.temperature).to(s.dtype)
    teacher_inverse = (1 / batch.teacher_temperature).to(s.dtype)
    exponent = ds * inverse
    distance = exponent - dt * teacher_inverse
    # Equal logits are exactly no distance.
    same = batch.temperature == batch.teacher_temperature
    nothing = (s == float("-inf")) & (t == float("-inf"))
    distance = tl.where(same, (ds - dt) * inverse, tl.where(nothing, 0.0, distance))
    constant = row.constant.to(s.dtype)[:, None]
    return Classes(
        et * row.to_p.to(s.dtype)[:, None],
        es * row.to_q.to(s.dtype)[:, None],
        distance,
        distance + constant,
        exponent,
        1 + 2 * tl.abs(constant),
    )


@triton.jit
def _times(weight, x):
    # A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def _plus(total, weight, terms):
    """With one more divergence, of the row's weight."""
    w = weight.to(terms[1].dtype)[:, None]
    off = _times(w, terms[3])
    return Compared(
        total.value + _times(w, terms[0]),
        total.v + _times(w, terms[1]),
        total.constant + _times(w, terms[2]),
        total.squares + off * off,
    )


@triton.jit
def _shares(parameter, c):
    """A share and the rest of it, (R, 1)."""
    return parameter.to(c.p.dtype)[:, None], (1 - parameter).to(c.p.dtype)[:, None]


@triton.jit
def _compare(c, row, asked):
    """The mixture of all but Renyi's."""
    zero, terms = tl.zeros(c.p.shape, c.p.dtype), row.terms
    total = Compared(zero, zero, zero, zero)
    if asked.mixture.forward_kl:
        total = _plus(total, terms.forward_kl, _forward_kl(c))
    if asked.mixture.reverse_kl:
        total = _plus(total, terms.reverse_kl, _reverse_kl(c))
    if asked.mixture.jsd:
        beta, rest = _shares(terms.beta, c)
        total = _plus(total, terms.jsd, _jsd(c, beta, rest))
    skew, rest = _shares(terms.skew, c)
    if asked.mixture.skew_forward_kl:
        total = _plus(total, terms.skew_forward_kl, _skew_forward_kl(c, skew, rest))
    if asked.mixture.skew_reverse_kl:
        total = _plus(total, terms.skew_reverse_kl, _skew_reverse_kl(c, skew, rest))
    if asked.mixture.total_variation:
        total = _plus(total, terms.total_variation, _total_variation(c))
    if asked.mixture.alpha:
        order, norm = terms.order.to(c.p.dtype)[:, None], row.norm.to(c.p.dtype)[:, None]
        total = _plus(total, terms.alpha, _alpha(c, order, norm))
    return total


@triton.jit
def _powers(c, row, asked):
    """Renyi's, and the squares of their errors."""
    power = tl.zeros(c.p.shape, c.p.dtype)
    squares = power
    if asked.mixture.renyi:
        order, norm = row.terms.order.to(c.p.dtype)[:, None], row.norm.to(c.p.dtype)[:, None]
        power, off = _power(c, order, norm, row.shift.to(c.p.dtype)[:, None])
        squares = power * off * power * off
    return power, squares


@triton.jit
def _no_between(sums):
    zero = sums.student * 0
    lowest = tl.full(zero.shape, float("inf"), sums.teacher_max.dtype)
    return Between(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, lowest)


@triton.jit
def _apart(x, is_at, batch):
    """Sums of all but the student's maximum, and that by itself."""
    return _total(tl.where(is_at, 0.0, x), batch), _total(tl.where(is_at, x, 0.0), batch)


@triton.jit
def _add_between(b, s, t, x, power, power_squares, columns, sums, tile, batch, asked):
    """The sums with one tile or block added."""
    v, v_at, v_label, squares, squares_at = b.v, b.v_at, b.v_label, b.squares, b.squares_at
    powers, powers_at, powers_label = b.powers, b.powers_at, b.powers_label
    of_powers, of_powers_at = b.power_squares, b.power_squares_at
    is_at = columns[None, :] == sums.at[:, None]
    is_label = columns[None, :] == tile.label[:, None]
    judged: tl.constexpr = asked.soft_grad and batch.temperature.dtype != s.dtype
    if asked.soft_grad:
        more, more_at = _apart(x.v, is_at, batch)
        v, v_at = v + more, v_at + more_at
        if asked.hard_grad:
            v_label += _total(tl.where(is_label, x.v, 0.0), batch)
    if judged:
        more, more_at = _apart(x.squares, is_at, batch)
        squares, squares_at = squares + more, squares_at + more_at
    if asked.mixture.renyi:
        more, more_at = _apart(power, is_at, batch)
        powers, powers_at = powers + more, powers_at + more_at
        if asked.hard_grad:
            powers_label += _total(tl.where(is_label, power, 0.0), batch)
        if judged:
            more, more_at = _apart(power_squares, is_at, batch)
            of_powers, of_powers_at = of_powers + more, of_powers_at + more_at
    with_mass = tl.where(s > float("-inf"), t, float("inf"))
    return Between(
        b.value + _total(x.value, batch),
        b.constant + _total(x.constant, batch),
        v,
        v_at,
        v_label,
        squares,
        squares_at,
        powers,
        powers_at,
        powers_label,
        of_powers,
        of_powers_at,
        tl.minimum(b.lowest, tl.min(with_mass, 1)),
    )


# ---- what it comes to ----------------------------------------------------------------------------


@triton.jit
def _infinite(weight, masked):
    return tl.where(masked, _times(weight, float("inf")), 0.0)


@triton.jit
def _infinities(w, student_masked, teacher_masked):
    """Of classes that only one of the two has mass on."""
    of_powers = (student_masked & (w.order > 1)) | (teacher_masked & (w.order < 0))
    value = _infinite(w.forward_kl, student_masked) + _infinite(w.reverse_kl, teacher_masked)
    return value + _infinite(w.alpha, of_powers) + _infinite(w.renyi, of_powers)


@triton.jit
def _least_weight(w):
    """Of all but Renyi's."""
    least = tl.minimum(tl.minimum(w.forward_kl, w.reverse_kl), tl.minimum(w.jsd, w.alpha))
    least = tl.minimum(least, tl.minimum(w.skew_forward_kl, w.skew_reverse_kl))
    return tl.minimum(least, w.total_variation)


@triton.jit
def _errors(w):
    """By how many times forward KL's error the value may be off."""
    off = tl.abs(w.forward_kl) + tl.abs(w.reverse_kl) + tl.abs(w.jsd) + tl.abs(w.skew_forward_kl)
    off += tl.abs(w.skew_reverse_kl) + tl.abs(w.total_variation)
    # A sum of powers is off by a rounding of 1, which these multiply; the exponential is rougher.
    off += _times(tl.abs(w.alpha), 2 / tl.abs(w.order * (w.order - 1)))
    return off + _times(tl.abs(w.renyi), 2 / tl.minimum(tl.abs(w.order - 1), 1.0))


@triton.jit
def _renyi(b, row):
    order = row.terms.order
    value = (tl.log(b.powers + b.powers_at) + row.shift) / (order - 1)
    # They have no class in common.
    value = tl.where((value == value) & (row.shift < LOWEST / 1024), float("inf"), value)
    return tl.where(value < 0, 0.0, value)  # rounding


@triton.jit
def _mixture_loss(sums, b, row, batch, asked):
    """The soft term, (R,), and by how many times forward KL's error it may be off."""
    w = row.terms
    value = b.value + b.constant * row.constant
    value = tl.where((value < 0) & (_least_weight(w) >= 0), 0.0, value)  # rounding
    if asked.mixture.renyi:
        value += _times(w.renyi, _renyi(b, row))
    value += _infinities(w, sums.lowest == float("-inf"), b.lowest == float("-inf"))
    some = (sums.student + sums.student_ones > 0) & (sums.teacher + sums.teacher_ones > 0)
    value = tl.where(some, value, float("nan"))  # every class masked: no distribution
    factor, off = tl.load(batch.scales + FACTOR), _errors(w)
    return tl.where(off == 0, 0.0, factor * value), factor * off


@triton.jit
def _vees(b, row):
    renyi = row.terms.renyi
    weight = _times(-renyi, 1 / (b.powers + b.powers_at))
    return Vees(
        b.v + _times(weight, b.powers),
        b.v_at + _times(weight, b.powers_at),
        b.v_label + _times(weight, b.powers_label),
        b.squares + _times(weight * weight, b.power_squares),
        b.squares_at + _times(weight * weight, b.power_squares_at),
        weight,
    )


@triton.jit
def _v(v, power, vees, asked):
    """Of a tile, with Renyi's."""
    if asked.mixture.renyi:
        weight = vees.of_powers.to(v.dtype)[:, None]
        v += _times(weight, power)
    return v


@triton.jit
def _v_again(s, t, es, et, sums, row, vees, batch, asked):
    """The same from the logits."""
    c = _classes(s, t, es, et, sums, row, batch)
    power, _ = _powers(c, row, asked)
    return _v(_compare(c, row, asked).v, power, vees, asked)


@triton.jit
def _mixture_factors(f, vees, batch):
    """Of q, and of v: the gradient is their difference."""
    mean = vees.others + vees.at
    zero = mean * 0
    return Factors(
        -f.student * mean, zero - batch.soft_scale, f.hard, f.smooth, f.smooth_total, f.label
    )


@triton.jit
def _mixture_error(sums, vees, not_q, has_sure, batch):
    """The squared error of the soft term's gradient, in roundings of its entries, (R,)."""
    mean = vees.others + vees.at
    error = vees.squares + tl.where(has_sure, 0.0, vees.squares_at)
    error += mean * mean * _squared(not_q, sums.student + sums.student_ones, has_sure)
    return batch.soft_scale * batch.soft_scale * error


# ---- the sweep -----------------------------------------------------------------------------------


@triton.jit
def _tile_between(s, t, es, et, sums, columns, tile, batch, asked):
    """Of rows that one tile holds; and v, which is kept."""
    row = _row(sums, tile, batch, asked)
    c = _classes(s, t, es, et, sums, row, batch)
    x = _compare(c, row, asked)
    power, squares = _powers(c, row, asked)
    b = _add_between(_no_between(sums), s, t, x, power, squares, columns, sums, tile, batch, asked)
    vees = _vees(b, row)
    return row, b, vees, _v(x.v, power, vees, asked)


@triton.jit
def _load_classes(tile, sums, row, columns, batch, asked, REAL: tl.constexpr):
    s, t = _load_both(tile, tile.active, columns, batch, asked, REAL)
    es, et, _, _ = _tile_exponentials(s, t, sums, batch, asked)
    return s, t, _classes(s, t, es, et, sums, row, batch)


@triton.jit
def _largest_exponent(tile, sums, row, batch, asked, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Of the powers. Distributions far apart have no other: in float32 their sum is 0 or too large,
    which is not good enough, and then this is asked for."""
    largest = tl.full(tile.label.shape, float("-inf"), REAL)
    for first in range(0, batch.classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        _, _, c = _load_classes(tile, sums, row, columns, batch, asked, REAL)
        exponent = c.exponent - c.distance * row.terms.order.to(REAL)[:, None]
        inside = (columns < batch.classes)[None, :]
        largest = tl.maximum(largest, tl.max(tl.where(inside, exponent, float("-inf")), 1))
    return tl.where(tile.active, largest, 0.0)


@triton.jit
def _sweep_between(tile, sums, batch, asked, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows of any length."""
    row = _row(sums, tile, batch, asked)
    if asked.mixture.renyi and tl.float64 == REAL:
        shift = _largest_exponent(tile, sums, row, batch, asked, REAL, BLOCK)
        row = Row(row.to_p, row.to_q, row.constant, row.norm, shift, row.terms)
    b = _no_between(sums)
    for first in range(0, batch.classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t, c = _load_classes(tile, sums, row, columns, batch, asked, REAL)
        x = _compare(c, row, asked)
        power, squares = _powers(c, row, asked)
        b = _add_between(b, s, t, x, power, squares, columns, sums, tile, batch, asked)
    return row, b, _vees(b, row)
