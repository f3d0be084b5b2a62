"""What each divergence is, of a tile of classes: the twin of ``csrc/cpu/policies.inl``."""
# What a kernel's arguments are, Triton alone knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdkernels.backends.triton_kernels.state import EPSILON

TINY = tl.constexpr(2.0**-100)


class Classes(NamedTuple):
    """A tile of classes, (R, BLOCK), or what holds for all of a row, (R, 1).

    ``distance`` is log(q / p) but for a constant of the row, ``ratio`` with it; ``exponent`` is
    log q but for a constant; ``spread`` 1 and twice the constant.
    """

    p: Any
    q: Any
    distance: Any
    ratio: Any
    exponent: Any
    spread: Any


# Each is given the classes, and says of them value, v, what the constant is multiplied with, and by
# how many roundings v may be off.


@triton.jit
def _ratio_off(c):
    """The error of ``ratio``, in roundings."""
    return tl.abs(c.distance) + tl.abs(c.exponent) + c.spread


@triton.jit
def _forward_kl(c):
    return -c.p * c.distance, -c.p, -c.p, 2 * c.p


@triton.jit
def _reverse_kl(c):
    term = c.q * c.distance
    return term, term, c.q, c.q * _ratio_off(c)


@triton.jit
def _mixture(c, of_p, of_q):
    """Of m = of_p p + of_q q: whether p is the larger of the two, the larger, m / larger and its
    logarithm; by way of that ratio, so that nothing overflows."""
    p_larger = c.p >= c.q
    largest = tl.maximum(tl.where(p_larger, c.p, c.q), TINY)
    ratio = tl.where(p_larger, c.q, c.p) / largest
    y = tl.where(p_larger, of_p, of_q) + tl.where(p_larger, of_q, of_p) * ratio
    return p_larger, largest, y, tl.log(y)


@triton.jit
def _jsd(c, beta, rest):
    """b KL(p | m) + (1 - b) KL(q | m), m = b p + (1 - b) q."""
    p_larger, _, _, log_y = _mixture(c, beta, rest)
    p, q = beta * c.p, rest * c.q
    value = p * (tl.where(p_larger, 0.0, -c.distance) - log_y)
    value += q * (tl.where(p_larger, c.distance, 0.0) - log_y)
    v = q * (tl.where(p_larger, c.ratio, 0.0) - log_y)
    return value, v, tl.where(p_larger, q, -p), q * (_ratio_off(c) + 4)


@triton.jit
def _skew_forward_kl(c, skew, rest):
    """KL(p | l p + (1 - l) q)."""
    p_larger, _, y, log_y = _mixture(c, skew, rest)
    v = -rest * tl.where(p_larger, c.q, c.p) / y  # p q / m
    value = c.p * (tl.where(p_larger, 0.0, -c.distance) - log_y)
    return value, v, tl.where(p_larger, 0.0, -c.p), -8 * v


@triton.jit
def _skew_reverse_kl(c, skew, rest):
    """KL(q | l q + (1 - l) p)."""
    p_larger, largest, y, log_y = _mixture(c, rest, skew)
    value = c.q * (tl.where(p_larger, c.distance, 0.0) - log_y)
    v = c.q * (tl.where(p_larger, c.ratio, 0.0) - log_y - skew * c.q / (largest * y))
    return value, v, tl.where(p_larger, c.q, 0.0), c.q * (_ratio_off(c) + 8)


@triton.jit
def _total_variation(c):
    """Its v jumps where p = q: next to that the sign of their difference is anybody's guess."""
    half = c.q / 2
    v = tl.where(c.q > c.p, half, tl.where(c.q < c.p, -half, c.p - c.q))
    sure = tl.abs(c.ratio) > _ratio_off(c) * (4 * EPSILON)
    return tl.abs(c.p - c.q) / 2, v, c.p * 0, tl.where(sure, c.q, c.q * 2.0**60)


@triton.jit
def _power(c, order, norm, shift):
    """p^a q^(1 - a), and by how many roundings of itself it may be off."""
    exponent = c.exponent - c.distance * order - shift
    off = tl.abs(exponent) + tl.abs(c.exponent) + 2 * tl.abs(order * c.distance) + 4
    return tl.exp(exponent) * norm, off


@triton.jit
def _alpha(c, order, norm):
    """(sum p^a q^(1 - a) - 1) / (a (a - 1)), with the 1 taken off class by class."""
    power, off = _power(c, order, norm, order * 0)
    value = (power - c.p * order - c.q * (1 - order)) / (order * (order - 1))
    v = -power / order
    return value, v, c.p * 0, tl.abs(v) * off
