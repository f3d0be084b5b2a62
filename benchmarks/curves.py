"""Scaling curves: the time over the classes, the rows, the threads and the temperature.

The points of a curve are measurements like any other. Where they share their inputs, the points
take turns, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple, TypeVar

import torch

from benchmarks.gpu_results import Results
from benchmarks.measuring import description, measure
from benchmarks.providers import Case
from benchmarks.results import COPY, CROSS_ENTROPY, EAGER, FUSED, INPLACE
from benchmarks.timing import Step, interleaved, runnable, spread

COMPARED = [FUSED, EAGER, CROSS_ENTROPY, COPY]
# Where PyTorch's own take a second and more.
ALONE = [FUSED, COPY]


class Grid(NamedTuple):
    """The points of all curves."""

    classes: list[int]
    elements: int  # rows × classes of the curve over the classes
    rows: list[int]
    classes_of_rows: list[int]
    temperatures: list[float]
    small: tuple[int, int]  # the shape of the curve over T, of all providers
    large: list[tuple[int, int]]  # over T and over the threads; PyTorch's own for the first alone


FULL = Grid(
    # Image classifiers, then vocabularies; between them what lies on the way.
    classes=[10, 30, 100, 300, 1000, 3000, 10000, 32000, 65536, 128256, 262144],
    elements=1 << 22,  # 16 MB an array in float32: larger than the caches of a core
    rows=[1, 4, 16, 64, 256, 1024, 4096, 16384],
    classes_of_rows=[100, 1000],
    # Whole numbers and others, which a kernel may treat differently.
    temperatures=[0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.5, 8.0, 20.0],
    small=(1024, 1000),
    large=[(512, 32000), (256, 128256)],
)
QUICK = Grid(
    classes=[10, 100, 1000, 4000],
    elements=1 << 14,
    rows=[1, 16, 64],
    classes_of_rows=[100],
    temperatures=[1.0, 1.5, 2.0, 4.0],
    small=(16, 1000),
    large=[(32, 1000)],
)


def curves(grid: Grid, seconds: float) -> Iterator[Results]:
    """One after the other, in forward + backward and float32; ``seconds`` each."""
    yield _over_classes(grid, seconds)
    for classes in grid.classes_of_rows:
        yield _over_rows(grid, classes, seconds)
    yield _over_threads(grid.large[0], COMPARED, seconds)
    for shape in grid.large[1:]:
        yield _over_threads(shape, ALONE, seconds)
    yield _over_temperatures(grid.small, grid.temperatures, COMPARED, seconds)
    for shape in grid.large:
        yield _over_temperatures(shape, grid.temperatures, ALONE, seconds)


def _case(rows: int, classes: int, temperature: float = 4.0) -> Case:
    return Case(rows, classes, temperature, torch.float32)


def _over_classes(grid: Grid, seconds: float) -> Results:
    share, over_classes = seconds / len(grid.classes), [FUSED, INPLACE, *COMPARED[1:]]
    points = [
        measure(_case(max(1, grid.elements // classes), classes), share, providers=over_classes)
        for classes in grid.classes
    ]
    return {"over": "classes", "title": f"N × C ≈ {grid.elements:,}, T = 4", "points": points}


def _over_rows(grid: Grid, classes: int, seconds: float) -> Results:
    share = seconds / len(grid.rows)
    points = [measure(_case(rows, classes), share, providers=COMPARED) for rows in grid.rows]
    return {"over": "rows", "title": f"C = {classes:,}, T = 4", "points": points}


def _over_threads(shape: tuple[int, int], providers: list[str], seconds: float) -> Results:
    """1, 2, 4 ... threads, up to what torch would use; the threads are set before each run."""
    most = torch.get_num_threads()
    counts = sorted({*(1 << i for i in range(most.bit_length())), most})
    case = _case(*shape)
    setters = {count: _thread_setter(count) for count in counts}
    steps = {
        (count, name): _after(setters[count], case.step(name))
        for count in counts
        for name in providers
    }
    try:
        found = _take_turns(steps, seconds)
    finally:
        torch.set_num_threads(most)
    points = [description(case) | {"threads": n, "providers": found[n]} for n in counts]
    return {"over": "threads", "title": f"({shape[0]}, {shape[1]}), T = 4", "points": points}


def _thread_setter(count: int) -> Callable[[], object]:
    return lambda: torch.set_num_threads(count)


def _after(first: Callable[[], object], step: Step) -> Step:
    """The step, with something more to do before it."""

    def prepare() -> None:
        first()
        if step.prepare is not None:
            step.prepare()

    return Step(step.run, prepare)


def _over_temperatures(
    shape: tuple[int, int], temperatures: list[float], providers: list[str], seconds: float
) -> Results:
    case = _case(*shape)
    cases = {temperature: case.at(temperature) for temperature in temperatures}
    steps = {(t, name): of.step(name) for t, of in cases.items() for name in providers}
    found = _take_turns(steps, seconds)
    points = [description(of) | {"providers": found[t]} for t, of in cases.items()]
    return {"over": "temperature", "title": f"({shape[0]}, {shape[1]})", "points": points}


Point = TypeVar("Point", bound=Hashable)


def _take_turns(
    steps: dict[tuple[Point, str], Step], seconds: float
) -> dict[Point, dict[str, Results]]:
    """All points of a curve together; by point and provider."""
    able, reasons = runnable(steps)
    found: dict[Point, dict[str, Results]] = {point: {} for point, _ in steps}
    for (point, name), reason in reasons.items():
        found[point][name] = {"error": reason}
    for (point, name), turns in interleaved(able, seconds).items():
        found[point][name] = spread(turns)
    return found
