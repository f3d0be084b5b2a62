"""The picture of a run: validation accuracy over the optimiser steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdkernels.train.checkpoints import write
from kdkernels.train.compare import mean_and_spread
from kdkernels.train.trainer import Curve


def save_curves(
    path: Path, title: str, students: Mapping[str, Sequence[Curve]], teacher: Sequence[float]
) -> None:
    """Draw mean and spread over the seeds of each kind of student, and the teacher as a line.

    Args:
        students: name in the legend to the curves of its seeds, all with the same steps.
        teacher: the teachers' final validation accuracy, one per seed.
    """
    # The Figure alone, not pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, curves in students.items():
        steps = curves[0].steps
        by_step = zip(*(curve.accuracy for curve in curves), strict=True)
        points = [mean_and_spread([100 * a for a in accuracies]) for accuracies in by_step]
        mean = [m for m, _ in points]
        low = [m - (spread or 0) for m, spread in points]
        high = [m + (spread or 0) for m, spread in points]
        (line,) = axes.plot(steps, mean, marker="o", markersize=3, label=name)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(100 * statistics.mean(teacher), color="black", linestyle="--", label="teacher")
    if len(teacher) > 1:
        title += f": mean ± sample standard deviation over {len(teacher)} seeds"
    axes.set(title=title, xlabel="optimiser step of the student", ylabel="validation accuracy (%)")
    axes.set_ylim(top=101)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write(path, lambda aside: figure.savefig(aside, dpi=150))
