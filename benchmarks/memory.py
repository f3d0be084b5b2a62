"""The memory of one step, tracked: what torch's allocator was asked for, and what became resident.

The allocator sees every tensor, to the byte, and nothing else: the memory that kdkernels keeps for
large gradients is counted beside it. The operating system sees native scratch memory, too, in whole
pages; it sees nothing of what was never written to.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kdkernels
from benchmarks.timing import Step
from kdkernels.backends import cpu

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): "reset the peak resident set size to the current value"


def of(step: Step, forget: Callable[[], None]) -> dict[str, int | None]:
    """Bytes that a step takes beyond what is there before it, ``forget`` having been called.

    ``peak_bytes``: the most that were allocated at one time. ``total_bytes``: all allocations
    together. ``largest_bytes``: the largest of them. ``resident_bytes``: growth of the resident
    memory, None where the system does not tell. The step has to have run before: what it keeps for
    the next time is no part of it.
    """
    _prepare(step, forget)
    found: dict[str, int | None] = dict(_summary(allocations(step.run)))
    _prepare(step, forget)
    found["resident_bytes"] = resident_growth(step.run)
    return found


def _prepare(step: Step, forget: Callable[[], None]) -> None:
    forget()
    kdkernels.empty_cache()
    if step.prepare is not None:
        step.prepare()


def allocations(run: Callable[[], object]) -> list[tuple[int, int]]:
    """(address, bytes) of every allocation in the order of time; where it is freed, bytes < 0."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports to stderr otherwise
    kept: list[tuple[int, int]] = []
    new_gradient = cpu._new_gradient

    def recorded(student: Tensor) -> Tensor:
        grad = new_gradient(student)
        if grad.nbytes >= cpu.KEPT_BYTES:
            kept.append((grad.data_ptr(), grad.nbytes))
        return grad

    with (
        mock.patch.object(cpu, "_new_gradient", recorded),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [e for e in events if e.get("name") == "[memory]"]
    found.sort(key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    return kept + [(e["args"]["Addr"], e["args"]["Bytes"]) for e in found]


def _summary(events: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Of what was allocated in these events; memory from before them may be freed meanwhile."""
    current: dict[int, int] = {}
    held = peak = total = largest = 0
    for address, count in events:
        if count > 0:
            current[address] = count
            held += count
            total += count
            peak, largest = max(peak, held), max(largest, count)
        else:
            held -= current.pop(address, 0)
    return {"peak_bytes": peak, "total_bytes": total, "largest_bytes": largest}


def resident_growth(run: Callable[[], object]) -> int | None:
    """How far the peak of the resident memory is above what is resident before; Linux alone."""
    _return_freed_pages()
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _return_freed_pages() -> None:
    """What the C library keeps for the next allocation would hide it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")
