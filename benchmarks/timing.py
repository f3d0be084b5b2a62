"""Interleaved timing: the steps take turns, so that drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

# A turn lasts so long at least: what the last provider left in the caches then counts little.
TURN_SECONDS = 5e-3
ROUNDS = 5  # at least

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]


class Step(NamedTuple):
    """What is timed, and what has to be done before each time and is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None

    def once(self) -> None:
        if self.prepare is not None:
            self.prepare()
        self.run()


def interleaved(
    steps: Mapping[Key, Step], seconds: float, clock: Clock = time.perf_counter
) -> dict[Key, list[float]]:
    """Seconds per run of each step, turn by turn, until the time is up."""
    repeats = {}
    for name, step in steps.items():
        turn(step, 1, clock)  # compiles, and maps memory
        repeats[name] = max(1, round(TURN_SECONDS / max(turn(step, 1, clock), 1e-9)))
    turns: dict[Key, list[float]] = {name: [] for name in steps}
    end = clock() + seconds
    rounds = 0
    while steps and (rounds < ROUNDS or clock() < end):
        for name, step in steps.items():
            turns[name].append(turn(step, repeats[name], clock))
        rounds += 1
    return turns


def turn(step: Step, repeats: int, clock: Clock = time.perf_counter) -> float:
    """Seconds per run, of so many in a row."""
    if step.prepare is not None:
        return sum(_prepared(step, clock) for _ in range(repeats)) / repeats
    run = step.run
    begin = clock()
    for _ in range(repeats):
        run()
    return (clock() - begin) / repeats


def _prepared(step: Step, clock: Clock) -> float:
    assert step.prepare is not None
    step.prepare()
    begin = clock()
    step.run()
    return clock() - begin


def spread(turns: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(turns, n=4, method="inclusive")
    return {"seconds": middle, "low_seconds": low, "high_seconds": high, "turns": len(turns)}


def runnable(steps: Mapping[Key, Step]) -> tuple[dict[Key, Step], dict[Key, str]]:
    """The steps that run here, and why the others do not; whatever compiles has done so by then."""
    able, reasons = {}, {}
    for name, step in steps.items():
        try:
            step.once()
            able[name] = step
        except Exception as error:  # a compiler that is missing, memory that does not suffice
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return able, reasons
