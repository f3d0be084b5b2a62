"""The pictures of the CPU report, each drawn from the results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from benchmarks.gpu_results import TRAIN, Results, in_order, providers
from benchmarks.results import (
    COMPILED,
    COPY,
    CROSS_ENTROPY,
    EAGER,
    EAGER_LOG_TARGET,
    FUSED,
    INPLACE,
    LABELS,
    TEMPERATURE,
    seconds,
    stem,
    threads,
)

# Colours of the Okabe-Ito palette, which hold for colour-blind readers, too.
STYLES = {
    FUSED: ("#0072B2", "o", "-"),
    INPLACE: ("#56B4E9", "s", "-"),
    EAGER: ("#CC79A7", "v", "-"),
    EAGER_LOG_TARGET: ("#E69F00", "D", "-"),
    COMPILED: ("#009E73", "^", "-"),
    CROSS_ENTROPY: ("#D55E00", "P", "-"),
    COPY: ("#555555", "x", "--"),
}
WIDTH = 8.4  # inches; at 150 dots each a little wider than a README is shown
BASELINES = [EAGER, COMPILED, CROSS_ENTROPY]  # of the speed-up


def draw(results: Results, folder: Path) -> list[str]:
    """Every picture that there are figures for; the names of the files."""
    pictures: dict[str, Callable[[Results], Figure | None]] = {
        "speedup": speedup,
        "floor": floor,
        "curves": curves,
    }
    drawn = []
    for name, picture in pictures.items():
        figure = picture(results)
        if figure is not None:
            file = f"{stem(results['environment'])}-{name}.png"
            figure.savefig(folder / file, dpi=150)
            plt.close(figure)
            drawn.append(file)
    return drawn


def _device(results: Results) -> str:
    known = results["environment"]
    return f"{known.get('device', 'unknown device')}, {threads(known)}"


def _legend(figure: Figure, panels: Iterable[Axes], columns: int) -> None:
    """One for all panels, below them; a provider may be missing in some."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=9,
    )


# --- speed-up by shape ----------------------------------------------------------------------------


def speedup(results: Results) -> Figure | None:
    """How many times the fused loss's time others take, by shape; a panel for each dtype."""
    chosen = [
        m
        for m in in_order(results["measurements"])
        if (m["direction"], m["temperature"], m["huge_pages"]) == (TRAIN, TEMPERATURE, False)
        and seconds(m, FUSED)
    ]
    dtypes = sorted({m["dtype"] for m in chosen}, reverse=True)  # float32 first
    if not chosen:
        return None
    figure, panels = plt.subplots(
        len(dtypes),
        1,
        figsize=(WIDTH, 0.9 + 2.5 * len(dtypes)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, dtype in zip(panels[:, 0], dtypes, strict=True):
        _bars(axes, [m for m in chosen if m["dtype"] == dtype])
        axes.set_title(dtype, fontsize=10)
    _limits(panels[0, 0], [ratio for m in chosen for ratio in _ratios(m).values()])
    figure.suptitle(
        f"Time over that of kdkernels, forward + backward, T = 4\n{_device(results)}", fontsize=11
    )
    _legend(figure, panels[:, 0], len(BASELINES))
    return figure


def _ratios(measurement: Results) -> dict[str, float]:
    ours = seconds(measurement, FUSED) or 0.0
    times = {name: seconds(measurement, name) for name in BASELINES}
    return {name: time / ours for name, time in times.items() if time is not None}


def _bars(axes: Axes, measurements: list[Results]) -> None:
    """From 1 up, or down where the other one is faster."""
    width = 0.8 / len(BASELINES)
    for i, name in enumerate(BASELINES):
        offset = (i - (len(BASELINES) - 1) / 2) * width
        heights = {
            group + offset: ratio
            for group, m in enumerate(measurements)
            if (ratio := _ratios(m).get(name)) is not None
        }
        bars = axes.bar(
            list(heights),
            [ratio - 1 for ratio in heights.values()],
            0.94 * width,
            bottom=1,
            color=STYLES[name][0],
            label=LABELS[name],
        )
        axes.bar_label(bars, [_value(r) for r in heights.values()], fontsize=8, padding=2)
    axes.axhline(1, color="#333333", linewidth=0.8)
    _logarithmic(axes, "y", "×")
    shapes = [f"({m['rows']}, {m['classes']})" for m in measurements]
    axes.set_xticks(range(len(measurements)), shapes, fontsize=9)
    _clean(axes)


def _value(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


def _limits(axes: Axes, ratios: list[float]) -> None:
    """With room for the values above and below the bars."""
    axes.set_ylim(0.7 * min(1, *ratios), 1.6 * max(1, *ratios))


FINE, COARSE = (1, 2, 5), (1,)  # what is labelled of a decade


def _logarithmic(axes: Axes, which: str, unit: str = "", steps: tuple[int, ...] = FINE) -> None:
    """Labelled in plain numbers."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}{unit}"))
    axis.set_minor_locator(NullLocator())


def _clean(axes: Axes) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# --- fraction of the floor over C -----------------------------------------------------------------


def floor(results: Results) -> Figure | None:
    """The copy's time over each provider's. F.cross_entropy moves other arrays, and is not here."""
    curve = _curve(results, "classes")
    if curve is None:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    for name in providers(curve["points"]):
        if name not in (CROSS_ENTROPY, COPY):
            shares = [(p["classes"], _share(p, name)) for p in curve["points"]]
            _line(axes, name, [(x, share) for x, share in shares if share is not None])
    colour, _, style = STYLES[COPY]
    axes.axhline(1, color=colour, linestyle=style, linewidth=1.4, label=LABELS[COPY])
    _logarithmic(axes, "x", steps=COARSE)
    axes.set_xlabel("classes C")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("fraction of the three-array floor")
    axes.set_title(
        f"Forward + backward, float32, {curve['title']}\n{_device(results)}", fontsize=11
    )
    _clean(axes)
    _legend(figure, [axes], 4)
    return figure


def _share(point: Results, name: str) -> float | None:
    time, copy = seconds(point, name), seconds(point, COPY)
    return copy / time if time and copy else None


def _curve(results: Results, over: str) -> Results | None:
    """The first of its kind, which has every provider."""
    return next((c for c in results["curves"] if c["over"] == over), None)


def _line(axes: Axes, name: str, points: list[tuple[float, float]]) -> None:
    colour, marker, style = STYLES[name]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            linestyle=style,
            markersize=5,
            linewidth=2.2 if name == FUSED else 1.4,
            zorder=3 if name == FUSED else 2,
            label=LABELS[name],
        )


# --- scaling curves -------------------------------------------------------------------------------

AXES = {"classes": "classes C", "rows": "rows N", "threads": "threads", "temperature": "T"}


def curves(results: Results) -> Figure | None:
    """The time over C, N, threads and T, one panel each."""
    chosen = [c for over in AXES if (c := _curve(results, over)) is not None]
    if not chosen:
        return None
    lines = -(-len(chosen) // 2)
    figure, panels = plt.subplots(
        lines, 2, figsize=(WIDTH, 0.9 + 2.9 * lines), squeeze=False, layout="constrained"
    )
    for axes, curve in zip(panels.flat, chosen, strict=False):
        _panel(axes, curve)
    for axes in panels.flat[len(chosen) :]:
        axes.remove()
    figure.suptitle(f"Forward + backward, float32\n{_device(results)}", fontsize=11)
    _legend(figure, panels.flat[: len(chosen)], 5)
    return figure


def _panel(axes: Axes, curve: Results) -> None:
    over = curve["over"]
    for name in providers(curve["points"]):
        times = [(p[over], seconds(p, name)) for p in curve["points"]]
        _line(axes, name, [(x, 1e3 * s) for x, s in times if s is not None])
    _logarithmic(axes, "y", steps=COARSE if over == "rows" else FINE)
    if over == "threads":
        axes.set_xticks([p["threads"] for p in curve["points"]])
        axes.margins(x=0.3)
    else:
        _logarithmic(axes, "x", steps=FINE if over == "temperature" else COARSE)
    axes.set_xlabel(AXES[over])
    axes.set_ylabel("ms")
    axes.set_title(curve["title"], fontsize=10)
    _clean(axes)
