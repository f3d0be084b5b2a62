"""``pytest benchmarks``: every provider on every shape, dtype and direction.

With ``--benchmark-disable`` each runs once, which says only that it can.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import memory
from benchmarks.gpu_results import FORWARD, TRAIN
from benchmarks.providers import Case, names
from benchmarks.replay import ReplayClock
from benchmarks.report import DTYPES, SHAPES
from benchmarks.results import COMPILED, COPY, TEMPERATURE
from benchmarks.timing import Step, interleaved, runnable

SECONDS = 4.0  # of turns, of all providers of a group together
DIRECTIONS = {"train": TRAIN, "forward": FORWARD}
GROUPS = [
    (shape, dtype, direction) for shape in SHAPES for dtype in DTYPES for direction in DIRECTIONS
]
# To compile takes ten seconds. Where nothing is measured, one group shows that it works.
COMPILED_ONCE = (SHAPES[0], "float32", "forward")

# pytest-benchmark runs one benchmark to its end before the next, and drift of the machine would hit
# one provider alone. So all providers of a group are measured beforehand, in turns, and what
# pytest-benchmark then times by this clock are those turns, replayed.
CLOCK = ReplayClock()


class Group(NamedTuple):
    name: str
    case: Case
    steps: dict[str, Step]
    failed: dict[str, str]
    turns: dict[str, list[float]]  # none where nothing is measured


PAIRS = [(group, name) for group in GROUPS for name in names(DIRECTIONS[group[2]])]


def named(part: Any) -> str:
    """128x10-float32-train for a group; a provider has its name."""
    if isinstance(part, str):
        return part
    (rows, classes), dtype, direction = part
    return f"{rows}x{classes}-{dtype}-{direction}"


@pytest.fixture(scope="module")
def group(request: pytest.FixtureRequest) -> Group:
    shape, dtype, direction = request.param
    case = Case(*shape, TEMPERATURE, getattr(torch, dtype))
    steps = case.steps(DIRECTIONS[direction])
    turns: dict[str, list[float]] = {}
    if not request.config.getoption("benchmark_disable"):
        steps, failed = runnable(steps)
        turns = interleaved(steps, SECONDS)
    elif request.param == COMPILED_ONCE:
        _, failed = runnable({COMPILED: steps[COMPILED]})  # there may be no compiler
    else:
        failed = {COMPILED: "takes ten seconds to compile: with --benchmark-disable one group does"}
    return Group(f"{shape} {dtype}, {DIRECTIONS[direction]}", case, steps, failed, turns)


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(
    ("group", "provider"), PAIRS, indirect=["group"], ids=named, scope="module"
)
def test_throughput(benchmark: Any, group: Group, provider: str) -> None:
    if provider in group.failed:
        pytest.skip(group.failed[provider])
    step = group.steps[provider]
    benchmark.group = group.name
    if not group.turns:
        benchmark.pedantic(step.once)
        return
    if provider != COPY:
        benchmark.extra_info.update(memory.of(step, group.case.drop_gradient))
    turns = group.turns[provider]
    CLOCK.load(turns)
    benchmark.pedantic(CLOCK.advance, rounds=len(turns), iterations=1)
