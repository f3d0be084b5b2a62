"""The CPU report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks.gpu_results import (
    FORWARD,
    TRAIN,
    Results,
    Target,
    array_bytes,
    in_order,
    providers,
    table,
)
from benchmarks.results import COPY, FUSED, LABELS, seconds, shape_of
from benchmarks.targets import LARGE, LARGE_TEMPERATURES, times


def duration(s: float) -> str:
    """Three digits."""
    number, unit = (s * 1e6, "µs") if s < 1e-3 else (s * 1e3, "ms")
    return f"{number:.{max(0, 2 - math.floor(math.log10(max(number, 1e-3))))}f} {unit}"


def size(count: int) -> str:
    for limit, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count} B"


def markdown(results: Results, plots: Sequence[str] = ()) -> str:
    """The whole report; ``plots``: the files of the pictures, beside it."""
    parts = [f"# {results['environment'].get('device', 'unknown device')}", _environment(results)]
    parts += [
        METHOD,
        "## Targets",
        LARGE_NAMED,
        _counted(results["targets"]),
        _targets(results["targets"]),
    ]
    parts += [f"![{_alternative(name)}]({name})" for name in plots]
    if results["measurements"]:
        parts += ["## Times", TIMES]
        for heading, chosen in _groups(results["measurements"]):
            parts += [f"### {heading}", _times(chosen)]
        parts += _memory(results["measurements"])
    if results["curves"]:
        parts += ["## Curves", "Forward + backward, float32."]
        for curve in results["curves"]:
            parts += [f"### Over {NAMED[curve['over']]}: {curve['title']}", _curve(curve)]
    if results["missing"]:
        parts += ["## Not compared", _bullets(results["missing"])]
    return "\n\n".join(parts) + "\n"


METHOD = """\
Medians of turns that the providers take one after the other on the same inputs, so that drift of
the machine hits all alike; ratios hold where the times do not. alpha = 0.9, the gradient is fresh
each time (`student.grad = None`). *Three-array copy* is the floor of a forward + backward: copying
student, teacher and gradient once, to memory that is already mapped; that of a forward copies two.
*Empty autograd step* is one autograd node that allocates a gradient and computes nothing.
*torch.compile* is the eager loss, compiled for the static shape. *F.cross_entropy alone* distils
nothing. With `inplace=True` the logits are written anew before each run, which is not timed; they
come from one more autograd node, in the place of a model, which is. Where *huge pages* are named,
torch's allocator asks the system for them (`THP_MEM_ALLOC_ENABLE=1`), in a process of its own."""
TIMES = "Median, with its multiple of kdkernels' in brackets. T is the temperature."
LARGE_NAMED = (
    f"*Large*: {' and '.join(map(str, LARGE))}, each at T = "
    f"{' and '.join(f'{t:g}' for t in LARGE_TEMPERATURES)}. All of forward + backward, but one."
)
NAMED = {"classes": "C", "rows": "N", "threads": "threads", "temperature": "T"}


def _bullets(named: dict[str, object]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in named.items() if value != "")


def _environment(results: Results) -> str:
    known = {k: v for k, v in results["environment"].items() if k != "device"}
    return _bullets(known) or "Nothing is known of the machine."


def _alternative(plot: str) -> str:
    """What a picture shows, from the end of its file name."""
    return plot.rsplit("-", 1)[-1].removesuffix(".png").capitalize()


def _counted(targets: list[Target]) -> str:
    met = sum(t["met"] is True for t in targets)
    failed = sum(t["met"] is False for t in targets)
    return f"{met} met, {failed} not met, {len(targets) - met - failed} not measured."


def _targets(targets: list[Target]) -> str:
    said = {True: "yes", False: "**no**", None: "not measured"}
    rows = [[t["name"], t["of"], t["measured"], said[t["met"]]] for t in targets]
    return table(["target", "of", "measured", "met"], rows)


def _groups(measurements: list[Results]) -> Iterator[tuple[str, list[Results]]]:
    """All shapes that were measured in the same way, under one heading."""
    groups: dict[str, list[Results]] = {}
    for m in measurements:
        pages = ", huge pages" if m["huge_pages"] else ""
        heading = f"{m['direction'].capitalize()}, {m['dtype']}, T = {m['temperature']:g}{pages}"
        groups.setdefault(heading, []).append(m)
    for heading, chosen in groups.items():
        yield heading, in_order(chosen)


def _times(chosen: list[Results]) -> str:
    names = providers(chosen)
    rows = [[str(shape_of(m)), *(_time(m, name) for name in names)] for m in chosen]
    return table(["(rows, classes)", *(_label(n, chosen[0]) for n in names)], rows)


def _label(name: str, measurement: Results) -> str:
    if name == COPY and measurement["direction"] == FORWARD:
        return "two-array copy"
    return LABELS[name]


def _time(measurement: Results, name: str) -> str:
    found = measurement["providers"].get(name, {})
    if "seconds" not in found:
        return found.get("error", "")
    ours = seconds(measurement, FUSED)
    multiple = "" if ours is None or name == FUSED else f" ({times(found['seconds'] / ours)})"
    return duration(found["seconds"]) + multiple


def _memory(measurements: list[Results]) -> list[str]:
    tracked = [m for m in measurements if _tracked(m, FUSED)]
    # Of the temperature nothing depends; the first measurement of a shape stands for all.
    first = {(shape_of(m), m["dtype"], m["direction"]): m for m in reversed(tracked)}
    parts = []
    for direction in (TRAIN, FORWARD):
        chosen = in_order([m for m in first.values() if m["direction"] == direction])
        if chosen:
            parts += [f"### {direction.capitalize()}", _bytes(chosen)]
    return ["## Memory", MEMORY, *parts] if parts else []


MEMORY = """\
In multiples of one array of rows × classes, the inputs not counted: the most that torch's
allocator held at one time / all that it was asked for / the growth of the resident memory, in
which native scratch memory would show (pages of 4 KiB, so it says little of small shapes; "–" where
the system does not tell)."""


def _bytes(chosen: list[Results]) -> str:
    names = [n for n in providers(chosen) if any(_tracked(m, n) for m in chosen)]
    rows = []
    for m in chosen:
        cells = [_multiples(m["providers"].get(name, {}), array_bytes(m)) for name in names]
        rows.append([f"{shape_of(m)} {m['dtype']}", size(array_bytes(m)), *cells])
    return table(["(rows, classes)", "one array", *(LABELS[n] for n in names)], rows)


def _tracked(measurement: Results, name: str) -> bool:
    return "peak_bytes" in measurement["providers"].get(name, {})


def _multiples(found: Results, array: int) -> str:
    if "peak_bytes" not in found:
        return ""
    counts = [found[key] for key in ("peak_bytes", "total_bytes", "resident_bytes")]
    return " / ".join("–" if count is None else f"{count / array:.2f}" for count in counts)


def _curve(curve: Results) -> str:
    names = providers(curve["points"])
    rows = []
    for point in curve["points"]:
        cells = [_time(point, name) for name in names]
        rows.append([_position(point, curve["over"]), *cells])
    return table([NAMED[curve["over"]], *(LABELS[n] for n in names)], rows)


def _position(point: Results, over: str) -> str:
    if over == "classes":
        return f"{point['classes']:,} (N = {point['rows']:,})"
    return f"{point[over]:,g}" if over == "temperature" else f"{point[over]:,}"
