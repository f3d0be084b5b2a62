"""What the kernels hand around, by name, and what more than one of them needs."""
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
# Beyond them, where the soft term is more than forward KL.
LARGEST = tl.constexpr(11)  # at most the largest entry of the gradient, where 1 is forward KL's
NUMBERS = tl.constexpr(12)  # those that the host has:
FACTOR = tl.constexpr(12)  # T², or 1
TEACHER_TEMPERATURE = tl.constexpr(13)
TEACHER_HIGH = tl.constexpr(14)
TEACHER_LOW = tl.constexpr(15)
PARAMETERS = tl.constexpr(16)  # Terms, in its order; or of decoupled distillation the two weights
GENERAL_SCALES = 27


class Mixture(NamedTuple):
    """Which divergences are compiled: divergences.py."""

    forward_kl: bool
    reverse_kl: bool
    jsd: bool
    skew_forward_kl: bool
    skew_reverse_kl: bool
    total_variation: bool
    alpha: bool
    renyi: bool


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
    mixture: Mixture | None = None  # None: forward KL at one temperature times T²
    decoupled: bool = False  # the label is a hole in the sweeps: decoupled.py


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
    row: Any  # its number


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
    teacher_temperature: Any
    teacher_high: Any
    teacher_low: Any
    scales: Any  # pointer to all of them
    per_row: Any  # pointers to weights and parameters that each row has of its own: Terms


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


class Terms(NamedTuple):
    """The weights of a mixture's divergences and their parameters, (R,), as each row has them."""

    forward_kl: Any
    reverse_kl: Any
    jsd: Any
    skew_forward_kl: Any
    skew_reverse_kl: Any
    total_variation: Any
    alpha: Any
    renyi: Any
    beta: Any
    skew: Any
    order: Any  # of the powers: divergence_alpha


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


@triton.jit
def _any(rows):
    """Whether it holds for any row, as a scalar."""
    return tl.max(rows.to(tl.int32), 0) > 0


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
def _put(pointer, index, value, mask):
    tl.store(pointer + index, value.to(pointer.dtype.element_ty), mask=mask)
