"""What the CPU report found: names, schema, and how to look something up.

Pure Python: torch is not needed to read, judge or print a report. Results are a dict:

    environment   what the figures hold for: device, versions, commit ...
    measurements  [{rows, classes, dtype, temperature, direction, threads, huge_pages, providers}]
                  with providers {name: {seconds, low_seconds, high_seconds, turns, and the bytes
                  of memory.py where they were tracked} or {error}}; seconds is the median, low
                  and high are the quartiles
    curves        [{over, title, points: [measurement]}], over one of the keys of a measurement
    missing       {name: why it is not compared}
    targets       [{name, of, measured, met}], made by targets.py
"""

from __future__ import annotations

import re

from benchmarks.gpu_results import TRAIN, Results

FUSED, INPLACE, EMPTY_STEP = "fused", "fused_inplace", "empty_step"
EAGER, EAGER_LOG_TARGET, COMPILED = "eager", "eager_log_target", "compiled"
CROSS_ENTROPY, COPY = "cross_entropy", "copy"
LABELS = {
    FUSED: "kdkernels",
    INPLACE: "kdkernels, inplace=True",
    EAGER: "eager PyTorch",
    EAGER_LOG_TARGET: "eager, log_target=True",
    COMPILED: "torch.compile",
    CROSS_ENTROPY: "F.cross_entropy alone",
    COPY: "three-array copy",
    EMPTY_STEP: "empty autograd step",
}
# The default temperature, which every shape is measured at.
TEMPERATURE = 4.0


def empty() -> Results:
    return {"environment": {}, "measurements": [], "curves": [], "missing": {}, "targets": []}


def stem(environment: Results) -> str:
    """Device and instruction set as a file name: intel-xeon-processor-avx512."""
    named = f"{environment.get('device', 'unknown device')} {environment.get('kernels', '')}"
    return re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-")


def threads(environment: Results) -> str:
    count = environment.get("threads", "?")
    return f"{count} thread" if count == "1" else f"{count} threads"


def find(
    results: Results,
    shape: tuple[int, int],
    dtype: str = "float32",
    temperature: float = TEMPERATURE,
    direction: str = TRAIN,
    huge_pages: bool = False,
) -> Results:
    """The measurement, or one without providers."""
    wanted = (*shape, dtype, temperature, direction, huge_pages)
    keys = ("rows", "classes", "dtype", "temperature", "direction", "huge_pages")
    for m in results["measurements"]:
        if tuple(m[key] for key in keys) == wanted:
            return m
    return {"providers": {}}


def seconds(measurement: Results, provider: str) -> float | None:
    return measurement["providers"].get(provider, {}).get("seconds")


def shape_of(measurement: Results) -> tuple[int, int]:
    return measurement["rows"], measurement["classes"]
