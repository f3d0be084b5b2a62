"""What the GPU report found: the targets it is judged by, and the JSON and Markdown it becomes.

Every step of ``gpu_report.py`` leaves its findings as a file in the report's work folder;
``publish`` puts together what is there, at any time, so that a report cut short still has results.
Pure Python: neither torch nor a GPU is needed to read, judge or print a report.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Target = dict[str, Any]  # name, of, measured, met (None: not measured)

TRAIN, FORWARD = "forward + backward", "forward"
# Student and teacher are read; with a backward their gradient is written.
ARRAYS = {TRAIN: 3, FORWARD: 2}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
COPY, EAGER, COMPILED, CROSS_ENTROPY = (
    "device copy",
    "eager PyTorch",
    "torch.compile",
    "F.cross_entropy",
)
LARGE_VOCABULARY = (4096, 128256)
SMALL_BATCH = (128, 100)
# The loss, the counts and the workspace beside the gradient.
SLACK_BYTES = 1 << 20


def ours(backend: str) -> str:
    return f"kdkernels {backend}"


def stem(environment: Results) -> str:
    """The device as a file name: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    device = environment.get("device", "unknown device")
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def array_bytes(measurement: Results) -> int:
    return measurement["rows"] * measurement["classes"] * ITEM_BYTES[measurement["dtype"]]


def floor_ms(measurement: Results, bytes_per_second: float) -> float:
    """The time that a device copy takes to move the arrays of a measurement, once each."""
    moved = ARRAYS[measurement["direction"]] * array_bytes(measurement)
    return 1e3 * moved / bytes_per_second


def find(results: Results, dtype: str, shape: tuple[int, int], direction: str = TRAIN) -> Results:
    for m in results["measurements"]:
        if (m["dtype"], (m["rows"], m["classes"]), m["direction"]) == (dtype, shape, direction):
            return m
    return {"providers": {}}


def milliseconds(measurement: Results, provider: str) -> float | None:
    return measurement["providers"].get(provider, {}).get("ms")


# --- targets -------------------------------------------------------------------------------------


def judge(results: Results) -> list[Target]:
    """All targets, met or not, for each of our backends and for the package as a whole."""
    targets = []
    for backend in results["backends"]:
        name = ours(backend)
        targets += [
            _copy_rate(results, name),
            _speedup(results, name, COMPILED, 3),
            _speedup(results, name, EAGER, 8),
            _memory(results, name),
            *_small_batch(results, name),
        ]
    for step, wanted in (
        ("correctness", "loss and gradient within the promised error of float64"),
        ("large", "right to the last row beyond 2^31 elements"),
        ("streams", "graphs, streams, no synchronisation"),
        ("memcheck", "compute-sanitizer memcheck clean"),
        ("racecheck", "compute-sanitizer racecheck clean"),
        ("initcheck", "compute-sanitizer initcheck clean"),
    ):
        targets.append(_all_checks(results, step, wanted))
    return targets


def _target(name: str, of: str, measured: str, met: bool | None) -> Target:
    return {"name": name, "of": of, "measured": measured, "met": met}


def _copy_rate(results: Results, provider: str) -> Target:
    """The lowest fraction of the floor where a vocabulary is large."""
    wanted = {shape for shape in results["shapes"] if shape[1] >= 4096}
    fractions = {}
    for shape in wanted:
        measurement = find(results, "bfloat16", shape)
        ms = milliseconds(measurement, provider)
        if ms:
            fractions[shape] = floor_ms(measurement, results["ceiling"]["bytes_per_second"]) / ms
    name = "≥ 90 % of the copy rate at every C ≥ 4,096, bfloat16"
    if not fractions:
        return _target(name, provider, "", None)
    worst = min(fractions, key=fractions.__getitem__)
    shown = f"{fractions[worst]:.0%} at C = {worst[1]:,}, the lowest of {len(fractions)}"
    if fractions[worst] < 0.9:
        return _target(name, provider, shown, False)
    return _target(name, provider, shown, True if wanted == set(fractions) else None)


def _speedup(results: Results, provider: str, baseline: str, factor: float) -> Target:
    measurement = find(results, "bfloat16", LARGE_VOCABULARY)
    ms, other = milliseconds(measurement, provider), milliseconds(measurement, baseline)
    name = f"≥ {factor} × {baseline} at {LARGE_VOCABULARY}, bfloat16"
    if not ms or not other:
        return _target(name, provider, "", None)
    return _target(name, provider, f"{other / ms:.1f} ×", other / ms >= factor)


def _memory(results: Results, provider: str) -> Target:
    """Against the gradient of the same measurement, in every forward + backward that was made."""
    name = "peak extra memory = one gradient"
    excess = {}
    for m in results["measurements"]:
        extra = m["providers"].get(provider, {}).get("extra_bytes")
        if m["direction"] == TRAIN and extra is not None:
            excess[m["dtype"], m["rows"], m["classes"]] = extra - array_bytes(m)
    if not excess:
        return _target(name, provider, "", None)
    worst = max(excess, key=excess.__getitem__)
    shown = f"at most {excess[worst] / 2**20:.2f} MiB more, at {worst[1:]} {worst[0]}"
    return _target(name, provider, shown, excess[worst] <= SLACK_BYTES)


def _small_batch(results: Results, provider: str) -> Iterator[Target]:
    for dtype, costs in results["small_batch"].items():
        mine, yardstick = costs.get(provider, {}), costs.get(CROSS_ENTROPY, {})
        stream, host = mine.get("stream_us"), mine.get("host_us")
        met = None if stream is None else stream < 25
        shown = "" if stream is None else f"{stream:.1f} µs"
        yield _target(f"< 25 µs on the stream at {SMALL_BATCH}, {dtype}", provider, shown, met)
        other = yardstick.get("host_us")
        name = f"fewer host µs than {CROSS_ENTROPY} at {SMALL_BATCH}, {dtype}"
        if host is None or other is None:
            yield _target(name, provider, "", None)
        else:
            yield _target(name, provider, f"{host:.1f} against {other:.1f} µs", host < other)


def _all_checks(results: Results, step: str, wanted: str) -> Target:
    """Met if the step ran to its end and every check of it that applies passed."""
    checks = [c for c in results["checks"] if c["step"] == step and c["passed"] is not None]
    passed = sum(c["passed"] for c in checks)
    outcome = next((s["outcome"] for s in results["steps"] if s["name"] == step), "not run")
    met = None
    if passed < len(checks):
        met = False
    elif checks and outcome == "passed":
        met = True
    shown = f"{passed} of {len(checks)}" if checks else ""
    if outcome not in ("passed", "failed"):
        shown = f"{shown} ({outcome})".strip()
    return _target(wanted, ", ".join(map(ours, results["backends"])), shown, met)


# --- Markdown ------------------------------------------------------------------------------------


def duration(ms: float) -> str:
    return f"{ms * 1e3:.1f} µs" if ms < 1 else f"{ms:.3f} ms" if ms < 10 else f"{ms:.1f} ms"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def markdown(results: Results) -> str:
    parts = [f"# {results['environment'].get('device', 'unknown device')}", _environment(results)]
    parts += ["## Targets", _targets(results)]
    failed = [c for c in results["checks"] if c["passed"] is False]
    parts += ["## Failed checks", _failed(failed) if failed else "None."]
    if results["measurements"]:
        parts += ["## Measurements", METHOD, _ceiling(results)]
        for direction in (TRAIN, FORWARD):
            for dtype in ITEM_BYTES:
                parts += _times(results, dtype, direction)
        parts += ["### Peak extra memory of a forward + backward, in gradients", _peaks(results)]
    if results["small_batch"]:
        parts += [f"### {SMALL_BATCH}: what a forward + backward costs", _costs(results)]
    if results["agreement"]:
        parts += ["### Do they compute the same?", _agreement(results)]
    parts += ["## Steps", _steps(results)]
    return "\n\n".join(parts) + "\n"


METHOD = f"""\
Medians, with the fraction of the floor in brackets: the time in which a large device copy moves
the {ARRAYS[TRAIN]} arrays of a forward + backward (student, teacher and gradient once each), or
the {ARRAYS[FORWARD]} of a forward. T = 4, alpha = 0.9. The providers take turns on the same
inputs, between CUDA events, the L2 cache flushed before each turn; inputs smaller than the cache
rotate among several sets. The gradient is fresh each time (`student.grad = None`). A batch too
small to fill the device waits for the host: its fraction says little, {SMALL_BATCH} has a table of
its own.
*{COPY}* moves as many bytes in one launch. *{COMPILED}* is the eager loss, compiled for the static
shape. *{CROSS_ENTROPY}* distils nothing, and reads no teacher: its fraction is of others' floor.
*Liger-Kernel* is its KL divergence beside its cross entropy; that and the inner kernel of
*orda-kernel* (its public functions take hidden states, not logits) overwrite the student logits, so
they work on a copy made before."""


def _environment(results: Results) -> str:
    environment = results["environment"]
    lines = [f"- {key}: {value}" for key, value in environment.items() if value and key != "device"]
    return "\n".join(lines) or "Nothing is known of the machine."


def _met(met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "not measured"}[met]


def _targets(results: Results) -> str:
    rows = [[t["name"], t["of"], t["measured"], _met(t["met"])] for t in results["targets"]]
    return table(["target", "of", "measured", "met"], rows)


def _failed(checks: list[Results]) -> str:
    return "\n".join(f"- {c['step']}: {c['name']}: {c['detail']}" for c in checks)


def _ceiling(results: Results) -> str:
    ceiling = results["ceiling"]
    return (
        f"Device copy of {ceiling['bytes'] / 1e9:.2f} GB, read and written: "
        f"{ceiling['bytes_per_second'] / 1e12:.3f} TB/s."
    )


def providers(measurements: list[Results]) -> list[str]:
    return list(dict.fromkeys(name for m in measurements for name in m["providers"]))


def in_order(measurements: list[Results]) -> list[Results]:
    return sorted(measurements, key=lambda m: (m["classes"], m["rows"]))


def _times(results: Results, dtype: str, direction: str) -> list[str]:
    chosen = in_order(
        [m for m in results["measurements"] if (m["dtype"], m["direction"]) == (dtype, direction)]
    )
    if not chosen:
        return []
    names = providers(chosen)
    rows = []
    for m in chosen:
        floor = floor_ms(m, results["ceiling"]["bytes_per_second"])
        cells = [_time(m["providers"].get(name, {}), floor) for name in names]
        rows.append([f"({m['rows']}, {m['classes']})", duration(floor), *cells])
    return [f"### {direction.capitalize()}, {dtype}", table(["shape", "floor", *names], rows)]


def _time(result: Results, floor: float) -> str:
    if "ms" in result:
        return f"{duration(result['ms'])} ({floor / result['ms']:.0%})"
    return result.get("error", "")


def _peaks(results: Results) -> str:
    chosen = in_order([m for m in results["measurements"] if m["direction"] == TRAIN])
    names = [name for name in providers(chosen) if name != COPY]
    rows = []
    for m in chosen:
        cells = []
        for name in names:
            extra = m["providers"].get(name, {}).get("extra_bytes")
            cells.append("" if extra is None else f"{extra / array_bytes(m):.2f}")
        rows.append([f"({m['rows']}, {m['classes']}) {m['dtype']}", *cells])
    return table(["shape", *names], rows)


def _costs(results: Results) -> str:
    rows = []
    for dtype, costs in results["small_batch"].items():
        for name, cost in costs.items():
            shown = [
                f"{cost[key]:.1f} µs" if cost.get(key) is not None else ""
                for key in ("host_us", "stream_us")
            ]
            rows.append([dtype, name, *shown, cost.get("error", "")])
    header = ["dtype", "provider", "host, to enqueue", "stream, replaying a CUDA graph", ""]
    return table(header, rows)


def _agreement(results: Results) -> str:
    rows = [
        [name, result.get("error") or f"{result['gradient_error']:.1e}"]
        for name, result in results["agreement"].items()
    ]
    return table(["provider", "gradient off by, of its norm, float32"], rows)


def _steps(results: Results) -> str:
    rows = [[s["name"], s["outcome"], f"{s['seconds']:.0f} s"] for s in results["steps"]]
    return table(["step", "outcome", "time"], rows)


# --- files ---------------------------------------------------------------------------------------


def write_part(work: Path, name: str, part: Any) -> None:
    """Leave a step's findings; whole or not at all, as the step may be ended while it writes."""
    work.mkdir(parents=True, exist_ok=True)
    unfinished = work / f"{name}.json.new"
    unfinished.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(work / f"{name}.json")


def read_part(work: Path, name: str, missing: Any) -> Any:
    path = work / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else missing


def collect(work: Path) -> Results:
    """Whatever the steps have found so far, judged."""
    results: Results = {
        "environment": read_part(work, "environment", {}),
        "backends": [],
        "shapes": [],
        "measurements": [],
        "ceiling": {},
        "agreement": {},
        "steps": read_part(work, "steps", []),
        "checks": [],
    }
    results |= read_part(work, "measurements", {})
    results["small_batch"] = read_part(work, "small_batch", {})
    results["shapes"] = [tuple(shape) for shape in results["shapes"]]
    for path in sorted(work.glob("checks-*.json")):
        results["checks"] += json.loads(path.read_text(encoding="utf-8"))
    results["targets"] = judge(results)
    return results


def publish(work: Path, folder: Path) -> Results:
    """Write <device>.json and <device>.md, once the device is known; copies go to $OUT, if set."""
    results = collect(work)
    if results["environment"]:
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / stem(results["environment"])
        text = json.dumps(results, indent=1) + "\n"
        name.with_suffix(".json").write_text(text, encoding="utf-8")
        name.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
        copy_out(folder, name.name)
    return results


def copy_out(folder: Path, name: str) -> None:
    if os.environ.get("OUT"):
        target = Path(os.environ["OUT"])
        target.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{name}*"):
            shutil.copy(path, target)
