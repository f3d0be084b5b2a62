"""One measurement: every provider on one shape, dtype, temperature and direction, in turns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks import memory
from benchmarks.gpu_results import TRAIN, Results
from benchmarks.providers import Case, names
from benchmarks.results import COPY
from benchmarks.timing import interleaved, runnable, spread


def description(case: Case, direction: str = TRAIN, huge_pages: bool = False) -> Results:
    """What is measured, as the results name it."""
    rows, classes = case.student.shape
    return {
        "rows": rows,
        "classes": classes,
        "dtype": str(case.student.dtype).removeprefix("torch."),
        "temperature": case.temperature,
        "direction": direction,
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages,
    }


def measure(
    case: Case,
    seconds: float,
    direction: str = TRAIN,
    providers: Iterable[str] | None = None,
    *,
    with_memory: bool = False,
    huge_pages: bool = False,
) -> Results:
    """Median and quartiles of each provider, its memory if wanted, and why it failed if it did."""
    wanted = names(direction) if providers is None else providers
    steps = {name: case.step(name, direction) for name in wanted}
    able, reasons = runnable(steps)
    found: dict[str, dict[str, Any]] = {name: {} for name in steps}
    for name, reason in reasons.items():
        found[name]["error"] = reason
    if with_memory:
        for name in able.keys() - {COPY}:  # which writes to memory that is there already
            found[name] |= memory.of(able[name], case.drop_gradient)
    for name, turns in interleaved(able, seconds).items():
        found[name] |= spread(turns)
    return description(case, direction, huge_pages) | {"providers": found}
