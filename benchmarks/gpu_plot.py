"""The picture of a GPU report: how close each provider comes to the rate of a device copy."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.gpu_results import (
    COMPILED,
    COPY,
    CROSS_ENTROPY,
    EAGER,
    TRAIN,
    Results,
    floor_ms,
    in_order,
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
    dtypes = list(dict.fromkeys(m["dtype"] for m in results["measurements"]))
    if not trained:
        return False
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(6.4 * len(dtypes), 4.6), sharey=True, squeeze=False
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        _panel(axes, results, dtype, [m for m in trained if m["dtype"] == dtype])
    panels[0][0].set_ylabel("share of the device copy's rate, 3 arrays")
    figure.suptitle(
        f"Forward + backward of CE + KL on {results['environment'].get('device', '?')}: "
        "the share of the floor"
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(7, len(labels)), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _panel(axes: Axes, results: Results, dtype: str, measurements: list[Results]) -> None:
    rate = results["ceiling"]["bytes_per_second"]
    ours = iter(OURS)
    for name in providers(measurements):
        if name == CROSS_ENTROPY:  # moves other arrays: its share of this floor says nothing
            continue
        mine = name.startswith("kdkernels")
        colour, marker = next(ours) if mine else STYLES.get(name, ("#000000", "."))
        points = [
            (m["classes"], floor_ms(m, rate) / m["providers"][name]["ms"])
            for m in measurements
            if "ms" in m["providers"].get(name, {})
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                label=name,
                linewidth=2.2 if mine else 1.4,
                linestyle="--" if name == COPY else "-",
                zorder=3 if mine else 2,
            )
    axes.axhline(0.9, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks([m["classes"] for m in measurements])
    axes.set_xticklabels(
        [f"C = {m['classes']:,}\nN = {m['rows']:,}" for m in measurements],
        rotation=45,
        ha="right",
        fontsize=8,
    )
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_title(dtype)
