"""How many rows and classes a Triton program takes, by the number of classes."""

from __future__ import annotations

import math
from typing import NamedTuple


class Shape(NamedTuple):
    """Compile-time sizes of a launch of the rows."""

    rows: int  # of a program
    block: int  # classes of a tile
    resident: bool  # whole rows stay in registers; else they are swept block by block, twice
    threads: int


class Regime(NamedTuple):
    """How rows of up to ``classes`` classes are computed."""

    classes: float
    elements: int  # of a tile: several rows of few classes, or a block of more
    resident: bool
    per_thread: int  # elements of a tile


# As many elements per thread as spill no register where the gradient is made; what that comes to is
# recorded by tests/test_triton.py.
_FLOAT = (
    # A warp per tile: sums without a barrier. More rows would each bring their float64 scalars to
    # every thread, where rows are not aligned and each thread has a piece of every row.
    Regime(64, 64, True, 2),
    Regime(256, 256, True, 4),
    # One row per program, read once. Beyond 4,096 classes two rows of exponentials and the scalars
    # are more than the register file gives to that many threads.
    Regime(4096, 4096, True, 8),
    # Blocks: small, so that several programs share a multiprocessor and one loads while another
    # computes. The second sweep finds its row in the L2 cache.
    Regime(math.inf, 1024, False, 8),
)
# In double, which takes twice the registers: float64 logits, and rows that are done again, which
# come one at a time: those of up to 128 classes in pieces of 64, a class to a thread.
_DOUBLE = (Regime(64, 64, False, 2), Regime(math.inf, 1024, False, 4))
_AGAIN = (Regime(128, 64, False, 1), Regime(math.inf, 512, False, 4))
# The same where the soft term is more than forward KL, which takes more registers for a class.
_GENERAL_FLOAT = (
    Regime(64, 64, True, 2),
    Regime(256, 256, True, 4),
    Regime(1024, 1024, True, 4),
    Regime(math.inf, 1024, False, 4),
)
_GENERAL_DOUBLE = (Regime(64, 64, False, 2), Regime(math.inf, 256, False, 1))
_GENERAL_AGAIN = (Regime(128, 64, False, 1), Regime(math.inf, 256, False, 1))


class Regimes(NamedTuple):
    """The tables of one kind of loss."""

    in_float: tuple[Regime, ...]
    in_double: tuple[Regime, ...]
    again: tuple[Regime, ...]  # rows that float32 was not enough for


PLAIN = Regimes(_FLOAT, _DOUBLE, _AGAIN)
GENERAL = Regimes(_GENERAL_FLOAT, _GENERAL_DOUBLE, _GENERAL_AGAIN)


def shape_of(classes: int, regimes: tuple[Regime, ...], warp: int) -> Shape:
    """What a table says of rows of so many classes, with so many threads to a warp."""
    regime = next(r for r in regimes if classes <= r.classes)
    block = min(_power_of_two(classes), regime.elements)
    several = regime.classes <= 64  # a row that is done again comes alone
    rows = regime.elements // block if several else 1
    threads = max(rows * block // regime.per_thread, warp)
    return Shape(rows, block, regime.resident, threads)


def _power_of_two(classes: int) -> int:
    return max(16, 1 << (classes - 1).bit_length())
