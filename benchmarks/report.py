"""``python -m benchmarks.report``: every provider on every shape in one run, as a Markdown table.

The providers take turns on the same inputs, so that drift of the machine hits all alike; the
figures are medians. Ratios are what to quote: they hold where milliseconds do not.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import kdkernels
from benchmarks.providers import PROVIDERS, Case

SHAPES = [(128, 10), (128, 100), (128, 1000), (512, 32000), (256, 128256)]
SECONDS_PER_SHAPE = 10.0


def medians(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of each step; they take turns until the time is up, 5 rounds at least.

    A turn lasts 5 ms at least, so that what the last provider left in the caches counts little.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    repeats = {}
    for name, step in steps.items():
        step()
        repeats[name] = max(1, round(5e-3 / _seconds(step, 1)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            times[name].append(_seconds(step, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(step: Callable[[], None], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begin) / repeats


def machine() -> str:
    """The processor, the threads and the versions: what the figures hold for."""
    names = (
        [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else [platform.processor()]
    )
    from kdkernels import _cpu

    return (
        f"{names[0]}, {torch.get_num_threads()} threads, {_cpu.instruction_set()}; "
        f"torch {torch.__version__}, kdkernels {kdkernels.__version__}, "
        f"Python {platform.python_version()}"
    )


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def main() -> None:
    print(f"Forward + backward, float32, T = 4, medians. {machine()}.\n")
    print(
        "| (rows, classes) | fused | eager PyTorch | F.cross_entropy alone | three-array copy "
        "| empty autograd step | eager / fused | fused / copy |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for rows, classes in SHAPES:
        case = Case(rows, classes, temperature=4.0, dtype=torch.float32)
        steps = {name: case.step(name) for name in PROVIDERS}
        time_of = medians(steps | {"copy": case.copy_three_arrays}, SECONDS_PER_SHAPE)
        shown = [time_of[n] for n in ("fused", "eager", "cross_entropy", "copy", "empty_step")]
        print(
            f"| ({rows}, {classes}) | {' | '.join(map(duration, shown))} "
            f"| {time_of['eager'] / time_of['fused']:.1f}× "
            f"| {time_of['fused'] / time_of['copy']:.2f}× |",
            flush=True,
        )


if __name__ == "__main__":
    main()
