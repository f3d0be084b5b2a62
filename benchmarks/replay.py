"""A clock that repeats durations measured before, for pytest-benchmark to record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class ReplayClock:
    """``read`` is the timer, ``advance`` what is timed: the next duration goes by at each call."""

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: Iterator[float] = iter(())

    def load(self, durations: Iterable[float]) -> None:
        self._durations = iter(durations)
        self._now = 0.0  # near zero, where the difference of two readings loses nothing

    def read(self) -> float:
        return self._now

    def advance(self) -> None:
        self._now += next(self._durations)
