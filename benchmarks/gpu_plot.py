"""The picture of a GPU report: how close each provider comes to the rate of a device copy."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator, PercentFormatter

from benchmarks.gpu_results import (
    COMPILED,
    COPY,
    CROSS_ENTROPY,
    EAGER,
    TRAIN,
    Results,
    floor_ms,
    in_order,
    milliseconds,
    providers,
)

# Colours of the Okabe-Ito palette. Ours, which have no entry, take the first ones, in their order.
OURS = [("#0072B2", "o"), ("#D55E00", "s")]
STYLES = {
    COPY: ("#555555", "x"),
    COMPILED: ("#009E73", "^"),
    EAGER: ("#CC79A7", "v"),
    "Liger-Kernel": ("#E69F00", "D"),
    "orda-kernel": ("#56B4E9", "P"),
}


def plot(results: Results, path: Path) -> bool:
    """Forward + backward of each dtype that was measured, over C; False without measurements."""
    trained = in_order([m for m in results["measurements"] if m["direction"] == TRAIN])
    dtypes = sorted({m["dtype"] for m in trained})
    if not trained:
        return False
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(6.6 * len(dtypes), 4.6), sharey=True, squeeze=False
    )
    handles = {}  # a provider may have failed in all of one panel
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        _panel(axes, results, dtype, [m for m in trained if m["dtype"] == dtype])
        handles |= {handle.get_label(): handle for handle in axes.get_legend_handles_labels()[0]}
    panels[0][0].set_ylabel("fraction of the three-array floor")
    device = results["environment"].get("device", "unknown device")
    figure.suptitle(f"Forward + backward of CE + KL, {device}")
    columns = min(7 if len(dtypes) > 1 else 4, len(handles))
    figure.legend(handles=handles.values(), loc="lower center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, 0.06 * -(-len(handles) // columns), 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _panel(axes: Axes, results: Results, dtype: str, measurements: list[Results]) -> None:
    rate = results["ceiling"]["bytes_per_second"]
    ours = iter(OURS)
    at = range(len(measurements))  # evenly: at their C the largest would stand in each other's way
    for name in providers(measurements):
        if name == CROSS_ENTROPY:  # moves other arrays: its share of this floor says nothing
            continue
        mine = name.startswith("kdkernels")
        colour, marker = next(ours) if mine else STYLES.get(name, ("#000000", "."))
        times = [milliseconds(m, name) for m in measurements]
        shares = [  # a gap where it failed
            floor_ms(m, rate) / ms if ms else math.nan
            for m, ms in zip(measurements, times, strict=True)
        ]
        if any(times):
            axes.plot(
                at,
                shares,
                color=colour,
                marker=marker,
                label=name,
                linewidth=2.2 if mine else 1.4,
                linestyle="--" if name == COPY else "-",
                zorder=3 if mine else 2,
            )
    axes.axhline(0.9, color="#777777", linewidth=0.8, linestyle=":")
    shapes = [f"C = {m['classes']:,}\nN = {m['rows']:,}" for m in measurements]
    axes.set_xticks(at, shapes, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MultipleLocator(0.1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_title(dtype)
