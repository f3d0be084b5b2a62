"""The targets that the CPU report is judged by, each met or not by the figures of one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from benchmarks.gpu_results import FORWARD, Results, Target, array_bytes
from benchmarks.results import (
    COMPILED,
    COPY,
    CROSS_ENTROPY,
    EAGER,
    EMPTY_STEP,
    FUSED,
    INPLACE,
    LABELS,
    find,
    seconds,
    shape_of,
)

LARGE = [(512, 32000), (256, 128256)]
LARGE_TEMPERATURES = [2.0, 4.0]


class Ratio(NamedTuple):
    """One provider's time over another's, and how much it may be at most or has to be at least."""

    over: str
    under: str
    most: float | None = None
    least: float | None = None
    aim: float | None = None  # better than the bound, and not required
    excess: bool = False  # of both over the empty autograd step

    def name(self) -> str:
        over, under = LABELS[self.over], LABELS[self.under]
        if self.excess:
            over, under = f"{over} − empty step", f"{under} − empty step"
        return f"{over} {'≥' if self.least else '≤'} {self.least or self.most:g} × {under}"

    def of(self, measurement: Results) -> float | None:
        over, under = seconds(measurement, self.over), seconds(measurement, self.under)
        if over is None or under is None:
            return None
        if self.excess:
            nothing = seconds(measurement, EMPTY_STEP)
            if nothing is None:
                return None
            over, under = over - nothing, under - nothing
        return over / under if under > 0 else math.inf

    def meets(self, ratio: float) -> bool:
        return ratio >= self.least if self.least is not None else ratio <= (self.most or 0)

    def judge(self, of: str, measurements: Mapping[str, Results]) -> Target:
        """By the worst of the named measurements; none of them may be missing for it to be met."""
        ratios = {name: r for name, m in measurements.items() if (r := self.of(m)) is not None}
        if not ratios:
            return _target(self.name(), of, "", None)
        worst_first = sorted(ratios, key=ratios.__getitem__, reverse=self.least is None)
        worst, best = ratios[worst_first[0]], ratios[worst_first[-1]]
        measured = times(worst)
        if len(ratios) > 1:
            measured += f" at {worst_first[0]}, the worst of {len(ratios)}; the best {times(best)}"
        if self.aim is not None and worst > self.aim:
            measured += f"; short of the aim, {self.aim:g} ×"
        complete = len(ratios) == len(measurements)
        met = self.meets(worst) and (True if complete else None)
        return _target(self.name(), of, measured, met)


def times(ratio: float) -> str:
    return f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:.1f} ×" if ratio < 100 else f"{ratio:.0f} ×"


# At both large shapes and temperatures; with and without huge pages for PyTorch's own.
LARGE_RATIOS = {
    "float32": [
        Ratio(FUSED, COPY, most=1.8, aim=1.5),
        Ratio(INPLACE, COPY, most=1.5, aim=1.25),
        Ratio(EAGER, FUSED, least=30),
        Ratio(COMPILED, FUSED, least=10),
        Ratio(CROSS_ENTROPY, FUSED, least=6),
    ],
    "bfloat16": [Ratio(FUSED, COPY, most=2), Ratio(EAGER, FUSED, least=10)],
}
SMALL_RATIOS = {
    (128, 1000): [Ratio(EAGER, FUSED, least=7)],
    (128, 100): [
        Ratio(EAGER, FUSED, least=3.2),
        Ratio(FUSED, CROSS_ENTROPY, most=1.1),
        Ratio(EAGER, FUSED, least=14, excess=True),
    ],
    (128, 10): [Ratio(EAGER, FUSED, least=3), Ratio(EAGER, FUSED, least=12, excess=True)],
}
THREADS_GAIN = 1.8  # of two threads over one
TEMPERATURE_PENALTY = 1.5  # of a T that is no whole number
WHOLE = (2.0, 4.0)  # the temperatures that others are held against


def judge(results: Results) -> list[Target]:
    """All targets: met, not met, or not measured."""
    return [
        *_large(results, huge_pages=False),
        *_small(results),
        *_forward_memory(results),
        *_threads(results),
        *_temperatures(results),
        *_large(results, huge_pages=True),
    ]


def _target(name: str, of: str, measured: str, met: bool | None) -> Target:
    return {"name": name, "of": of, "measured": measured, "met": met}


def _large(results: Results, huge_pages: bool) -> Iterator[Target]:
    for dtype, ratios in LARGE_RATIOS.items():
        found = {
            f"{shape}, T = {t:g}": find(results, shape, dtype, t, huge_pages=huge_pages)
            for shape in LARGE
            for t in LARGE_TEMPERATURES
        }
        of = f"large, {dtype}" + (", huge pages" if huge_pages else "")
        for ratio in ratios:
            yield ratio.judge(of, found)


def _small(results: Results) -> Iterator[Target]:
    for shape, ratios in SMALL_RATIOS.items():
        for ratio in ratios:
            yield ratio.judge(f"{shape}, float32", {"T = 4": find(results, shape)})


def _forward_memory(results: Results) -> Iterator[Target]:
    """The largest allocation of a forward, wherever it is nearest to the size of the logits."""
    shares = {}
    for m in results["measurements"]:
        largest = m["providers"].get(FUSED, {}).get("largest_bytes")
        if m["direction"] == FORWARD and largest is not None:
            shares[f"{shape_of(m)} {m['dtype']}"] = largest / array_bytes(m)
    name = "a forward alone allocates nothing of the size of the logits"
    if not shares:
        yield _target(name, LABELS[FUSED], "", None)
        return
    worst = max(shares, key=shares.__getitem__)
    shown = f"at most {shares[worst]:.2g} of an array, at {worst}"
    yield _target(name, LABELS[FUSED], shown, shares[worst] < 1)


def _points(results: Results, over: str, shape: tuple[int, int]) -> list[Results]:
    for curve in results["curves"]:
        if curve["over"] == over and all(shape_of(p) == shape for p in curve["points"]):
            return curve["points"]
    return []


def _threads(results: Results) -> Iterator[Target]:
    for shape in LARGE:
        by = {p["threads"]: seconds(p, FUSED) for p in _points(results, "threads", shape)}
        one, two = by.get(1), by.get(2)
        name, of = f"two threads ≥ {THREADS_GAIN} × one", f"{shape}, float32"
        if one is None or two is None:
            yield _target(name, of, "", None)
        else:
            yield _target(name, of, times(one / two), one / two >= THREADS_GAIN)


def _temperatures(results: Results) -> Iterator[Target]:
    """The slowest T that is no whole number against the faster of T = 2 and T = 4."""
    name = f"T that is no whole number ≤ {TEMPERATURE_PENALTY} × T = 2 and T = 4"
    for shape in LARGE:
        points = _points(results, "temperature", shape)
        by = {p["temperature"]: s for p in points if (s := seconds(p, FUSED)) is not None}
        whole = [by[t] for t in WHOLE if t in by]
        others = {t: s for t, s in by.items() if t != round(t)}
        of = f"{shape}, float32"
        if not whole or not others:
            yield _target(name, of, "", None)
            continue
        slowest = max(others, key=others.__getitem__)
        ratio = others[slowest] / min(whole)
        shown = f"{times(ratio)} at T = {slowest:g}, the slowest of {len(others)}"
        yield _target(name, of, shown, ratio <= TEMPERATURE_PENALTY)
