"""The measurements of the GPU report: time, peak memory and host cost of every provider.

The providers take turns on the same inputs, so that drift of the machine hits all alike; a figure
is the median of its turns.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_checks, gpu_providers
from benchmarks.gpu_providers import Inputs, Provider, Step
from benchmarks.gpu_results import (
    COPY,
    CROSS_ENTROPY,
    FORWARD,
    SMALL_BATCH,
    TRAIN,
    publish,
    write_part,
)

# The most useful first: a report cut short has measured these. CIFAR-10, CIFAR-100 and ImageNet
# batches; a short row; language models of growing vocabulary.
SHAPES = [
    (4096, 128256),
    (8192, 32000),
    (8192, 4096),
    (2048, 262144),
    (128, 100),
    (1024, 1000),
    (128, 10),
]
DTYPES = ["bfloat16", "float32"]
WARM_UP_SECONDS = 30.0  # of a provider; to compile takes the most of it
MAX_SETS = 64  # of inputs, to get past the cache


class Plan(NamedTuple):
    """What is measured, on what; the dry run has a small one of its own."""

    device: str
    backends: list[str]
    shapes: list[tuple[int, int]]
    compiler: str
    copy_bytes: int  # of the copy that measures the ceiling
    turn_ms: float  # a turn lasts about so long, so that its ends count little
    enough_seconds: float  # of turns for one shape and direction
    folder: Path  # for the results


class Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        return self._end - time.perf_counter()


class WallClock:
    """Times steps on the CPU."""

    cache_bytes = 0

    def ms(self, step: Callable[[int], Any], repeats: int) -> float:
        begin = time.perf_counter()
        for i in range(repeats):
            step(i)
        return 1e3 * (time.perf_counter() - begin) / repeats

    def peak_bytes(self, step: Callable[[], Any]) -> int | None:
        step()
        return None

    def finish(self) -> None:
        """Nothing is under way on a CPU."""

    def release(self) -> None:
        """Nor is memory kept."""


class DeviceClock:
    """Times steps on the GPU, between events on its stream."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = properties.L2_cache_size
        # Writing it empties the cache of inputs, and keeps the device busy until the host is ahead:
        # the time of the first launch is not the step's.
        self._flush = torch.empty(
            max(1 << 29, 4 * self.cache_bytes), device="cuda", dtype=torch.uint8
        )

    def ms(self, step: Callable[[int], Any], repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        for i in range(repeats):
            step(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    def peak_bytes(self, step: Callable[[], Any]) -> int | None:
        """The most that a step asks for beyond what there was before it.

        As requested: what is allocated for it can be a megabyte more, whoever asks.
        """
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        step()
        torch.cuda.synchronize()
        peak: int = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        return peak - before

    def finish(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()


def clock_for(device: str) -> WallClock | DeviceClock:
    return WallClock() if device == "cpu" else DeviceClock()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in whatever runs longer: a compilation, above all."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: Exception) -> str:
    """One line for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = f"{type(error).__name__}: {error}".splitlines()
    return lines[0][:120]


def number_of_sets(rows: int, classes: int, item_bytes: int, cache_bytes: int) -> int:
    """Sets of student and teacher that together are four times the cache, up to a limit."""
    return max(1, min(MAX_SETS, -(-4 * cache_bytes // (2 * rows * classes * item_bytes))))


# --- one shape -----------------------------------------------------------------------------------


def measure_direction(
    candidates: list[Provider],
    direction: str,
    sets: list[Inputs],
    clock: WallClock | DeviceClock,
    plan: Plan,
    seconds: Callable[[], float],
) -> dict[str, dict[str, Any]]:
    """Time and peak memory of every provider; what fails says why.

    ``seconds``: asked after the warm-up for how long to take turns.
    """
    found: dict[str, dict[str, Any]] = {}
    turns: dict[str, tuple[Callable[[int], Any], int]] = {}
    for name, train, forward in candidates:
        step = train if direction == TRAIN else forward
        if step is None:
            continue
        try:
            with time_limit(WARM_UP_SECONDS):
                found[name], turns[name] = _warm_up(name, step, sets, clock, plan.turn_ms)
        except Exception as error:
            found[name] = {"error": reason(error)}
            clock.finish()  # raises if the device is beyond use
        for inputs in sets:
            inputs.drop_gradients()
    times: dict[str, list[float]] = {name: [] for name in turns}
    deadline = Deadline(seconds())
    while turns and (deadline.left() > 0 or len(times[next(iter(turns))]) < 3):
        for name, (step_of, repeats) in turns.items():
            times[name].append(clock.ms(step_of, repeats))
    for name, values in times.items():
        found[name] |= {
            "ms": statistics.median(values),
            "low_ms": min(values),
            "high_ms": max(values),
            "turns": len(values),
        }
    return found


def _warm_up(
    name: str, step: Step, sets: list[Inputs], clock: WallClock | DeviceClock, turn_ms: float
) -> tuple[dict[str, Any], tuple[Callable[[int], Any], int]]:
    """Compile, allocate, take the peak memory, and find how many steps make a turn."""

    def on_the_next_set(i: int) -> None:
        step(sets[i % len(sets)])

    for i in range(max(2, len(sets))):
        on_the_next_set(i)
    clock.finish()
    sets[0].drop_gradients()
    extra = None if name == COPY else clock.peak_bytes(lambda: step(sets[0]))
    alone = clock.ms(on_the_next_set, 3)
    repeats = max(1, min(500, round(turn_ms / alone)))
    return ({} if extra is None else {"extra_bytes": extra}), (on_the_next_set, repeats)


def ceiling(plan: Plan, clock: WallClock | DeviceClock) -> dict[str, float]:
    """What a large device copy moves per second, bytes read and bytes written."""
    source = torch.ones(plan.copy_bytes // 2, device=plan.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    clock.ms(lambda _: target.copy_(source), 2)
    ms = statistics.median(clock.ms(lambda _: target.copy_(source), 3) for _ in range(10))
    return {"bytes": plan.copy_bytes, "bytes_per_second": 1e3 * plan.copy_bytes / ms}


# --- the small batch -----------------------------------------------------------------------------


def small_batches(work: Path, plan: Plan) -> None:
    """Host and device microseconds of steps that are too small to fill the device.

    Captures come last, and all of it in a process of its own: one that fails can leave the device
    beyond use.
    """
    clock = clock_for(plan.device)
    (_, *candidates), _ = gpu_providers.available(plan.backends, plan.compiler)  # but the copy
    inputs = {d: Inputs(*SMALL_BATCH, getattr(torch, d), plan.device) for d in DTYPES}
    found: dict[str, dict[str, Any]] = {dtype: {} for dtype in DTYPES}
    # Others' steps wait for the device, which cannot be captured.
    capturable = [provider for provider in candidates if provider.name not in gpu_providers.OTHERS]
    measures = [("host_us", host_us, candidates)]
    if plan.device != "cpu":
        measures.append(("stream_us", stream_us, capturable))
    for cost, measure_cost, those in measures:
        for dtype, provider in itertools.product(DTYPES, those):
            costs = found[dtype].setdefault(provider.name, {})
            try:
                with time_limit(WARM_UP_SECONDS):
                    costs[cost] = measure_cost(provider.train, inputs[dtype], clock)
            except Exception as error:
                costs["error"] = reason(error)
            inputs[dtype].drop_gradients()
            write_part(work, "small_batch", found)


def host_us(step: Step, inputs: Inputs, clock: WallClock | DeviceClock) -> float:
    """The host's time to enqueue a step. Few enough in a row that the queue never fills."""
    rounds = []
    step(inputs)
    for _ in range(15):
        clock.finish()
        begin = time.perf_counter()
        for _ in range(40):
            step(inputs)
        rounds.append(1e6 * (time.perf_counter() - begin) / 40)
    return statistics.median(rounds)


def stream_us(step: Step, inputs: Inputs, clock: WallClock | DeviceClock) -> float:
    """The device's time for a step, the host's part aside: a graph of 20 steps, replayed."""
    clock.finish()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    inputs.drop_gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            step(inputs)
    graph.replay()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / 200)
    return statistics.median(times)


# --- all -----------------------------------------------------------------------------------------


def agreement(plan: Plan, rows: int = 1024, classes: int = 1000) -> dict[str, dict[str, Any]]:
    """How far each provider's float32 gradient is off: a baseline has to compute the same loss."""
    candidates, missing = gpu_providers.available(plan.backends, plan.compiler)
    answers: dict[str, dict[str, Any]] = {n: {"error": text} for n, text in missing.items()}
    for provider in candidates:
        if provider.name in (COPY, CROSS_ENTROPY):
            continue
        inputs = Inputs(rows, classes, torch.float32, plan.device)
        _, expected = gpu_checks.truth(inputs.student.detach(), inputs.teacher, inputs.labels)
        try:
            with time_limit(WARM_UP_SECONDS):
                grad = provider.train(inputs)
            assert grad is not None
            off = (grad.double() - expected).norm() / expected.norm()
            answers[provider.name] = {"gradient_error": off.item()}
        except Exception as error:
            answers[provider.name] = {"error": reason(error)}
    return answers


def measure(work: Path, plan: Plan, seconds: float) -> None:
    """Everything, the most useful first; results are published after every shape."""
    deadline = Deadline(seconds)
    clock = clock_for(plan.device)
    found: dict[str, Any] = {
        "backends": plan.backends,
        "shapes": plan.shapes,
        "ceiling": ceiling(plan, clock),
        "agreement": agreement(plan),
        "measurements": [],
    }
    cases = [(dtype, shape) for dtype in DTYPES for shape in plan.shapes]
    for i, (dtype, shape) in enumerate(cases):
        if deadline.left() < 1:
            print(f"no time was left for {len(cases) - i} of {len(cases)} shapes")
            break
        share = deadline.left() / (len(cases) - i)
        try:
            _measure_shape(found, plan, dtype, shape, clock, share)
        except torch.OutOfMemoryError:
            print(f"the inputs of {shape} {dtype} do not fit this device")
        write_part(work, "measurements", found)
        publish(work, plan.folder)


def _measure_shape(
    found: dict[str, Any],
    plan: Plan,
    dtype: str,
    shape: tuple[int, int],
    clock: WallClock | DeviceClock,
    seconds: float,
) -> None:
    kind = getattr(torch, dtype)
    count = number_of_sets(*shape, kind.itemsize, clock.cache_bytes)
    sets = [Inputs(*shape, kind, plan.device) for _ in range(count)]
    candidates, _ = gpu_providers.available(plan.backends, plan.compiler)
    end = Deadline(seconds)
    # What is left of the first direction's time goes to the second.
    for direction, share in ((TRAIN, 0.6), (FORWARD, 1.0)):
        providers = measure_direction(
            candidates,
            direction,
            sets,
            clock,
            plan,
            lambda share=share: min(share * end.left(), plan.enough_seconds),
        )
        found["measurements"].append(
            {
                "dtype": dtype,
                "rows": shape[0],
                "classes": shape[1],
                "direction": direction,
                "input_sets": count,
                "providers": providers,
            }
        )
        _show(found["measurements"][-1])
    del sets
    clock.release()


def _show(measurement: dict[str, Any]) -> None:
    shown = ", ".join(
        f"{name} {result['ms']:.4f}" if "ms" in result else f"{name} {result['error']}"
        for name, result in measurement["providers"].items()
    )
    m = measurement
    print(f"({m['rows']}, {m['classes']}) {m['dtype']} {m['direction']}, ms: {shown}", flush=True)


# --- before it: what is compiled at a first call --------------------------------------------------


def warm_compiler(plan: Plan) -> None:
    """Compile the eager loss for every shape, so that ``measure`` finds it in Inductor's cache."""
    for dtype, shape in itertools.product(DTYPES, plan.shapes):
        provider = gpu_providers.compiled(plan.compiler)
        _warm(provider, Inputs(*shape, getattr(torch, dtype), plan.device))
        print(f"compiled for {shape} {dtype}", flush=True)


def warm_kernels(plan: Plan, largest: int, share: tuple[int, int]) -> None:
    """One part of the kernels that Triton compiles for the checks and for ``measure``.

    There are a hundred, at seconds each, and a process compiles one at a time.
    """
    # For a number of classes; that of the rows is an argument.
    classes = {c for _, c in plan.shapes} | {c for _, c in gpu_checks.SMALL_SHAPES if c <= largest}
    dtypes = [getattr(torch, name) for name in (*DTYPES, "float16")]
    jobs: list[Callable[[str], Any]] = [
        lambda backend, case=case: gpu_checks.compare(gpu_checks.make(case, plan.device), backend)
        for case in gpu_checks.cases_up_to(largest)
    ]
    jobs += [
        lambda backend, c=c, d=d: _warm(
            gpu_providers.kdkernels(backend), Inputs(8, c, d, plan.device)
        )
        for c, d in itertools.product(sorted(classes), dtypes)
    ]
    part, parts = share
    for job, backend in itertools.product(jobs[part::parts], plan.backends):
        with contextlib.suppress(Exception):  # the checks will tell
            job(backend)


def _warm(provider: Provider, inputs: Inputs) -> None:
    provider.train(inputs)
    assert provider.forward is not None
    provider.forward(inputs)
