"""What the Triton kernels are told of a soft term that is more than forward KL times T²."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kdkernels.options import Options

# In the order of the kernels' Mixture and Terms (triton_kernels/state.py).
WEIGHTS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha",
    "renyi",
)
PER_ROW = (*WEIGHTS, "beta", "skew")
OF_TERM = {
    "jsd": "beta",
    "skew_forward_kl": "skew",
    "skew_reverse_kl": "skew",
    "alpha": "order",
    "renyi": "order",
}
# What divergences are at the ends of their parameters, beside nothing.
ENDS = {
    ("jsd", 0.0): "forward_kl",
    ("jsd", 1.0): "reverse_kl",
    ("skew_forward_kl", 0.0): "forward_kl",
    ("skew_reverse_kl", 0.0): "reverse_kl",
    ("alpha", 0.0): "reverse_kl",
    ("alpha", 1.0): "forward_kl",
    ("renyi", 1.0): "forward_kl",
}


class General(NamedTuple):
    compiled: tuple[bool, ...]  # by weight; none of them: decoupled distillation
    numbers: tuple[float, ...]
    largest: tuple[float, ...]  # by weight


def _single(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def in_two_parts(values: Collection[float]) -> tuple[float, ...]:
    """Each as two float32 that add up to it: Triton passes no others."""
    return tuple(part for v in values for part in (_single(v), _single(v - _single(v))))


@functools.lru_cache(maxsize=256)
def general(options: Options, per_row: frozenset[str]) -> General:
    """``per_row``: the names of what each row has a number of its own for."""
    own = options.teacher_temperature
    teacher = options.temperature if own is None else own
    exponent = math.log2(math.e) / teacher
    high, low = in_two_parts([exponent])
    factor = options.temperature**2 if options.scale_by_t2 else 1.0
    first = (factor, teacher, high, low)
    term = options.divergence[0]
    if term.name == "dkd":
        weights = (term.weight * term.parameter, term.weight * term.second)
        return General((), (*first, *weights), (1.0, 1.0))
    weight = {term.name: term.weight for term in options.divergence}
    parameter = {OF_TERM.get(t.name, ""): t.parameter for t in options.divergence}
    parameters = [parameter.get(name, 0.5) for name in ("beta", "skew", "order")]
    compiled = set(weight)
    for (name, end), other in ENDS.items():
        option = OF_TERM[name]
        if name in weight and (option in per_row or parameter[option] == end):
            compiled.add(other)
    return General(
        tuple(name in compiled for name in WEIGHTS),
        (*first, *(weight.get(name, 0.0) for name in WEIGHTS), *parameters),
        tuple(_largest(name, parameters[2]) for name in WEIGHTS),
    )


def _largest(name: str, order: float) -> float:
    """At most the largest entry of a row's gradient: see largest_factor in csrc/cpu/run.cpp."""
    if name in ("forward_kl", "total_variation"):
        return 1.0
    powers = name in ("alpha", "renyi")
    return 1024.0 if powers and not 0 <= order <= 1 else 16.0
