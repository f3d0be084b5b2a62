"""What a run leaves to look at: curves, a confusion matrix, a page with both and the numbers."""

from __future__ import annotations

import html
import io
import json
import platform
from pathlib import Path
from typing import Any

import torch

import kdkernels
from kdkernels import backends
from kdkernels.train.checkpoints import write
from kdkernels.train.config import Config, dumps
from kdkernels.train.errors import require
from kdkernels.train.experiment import Outcome, mean_and_spread, summary

Outcomes = dict[str, list[Outcome]]


def write_report(folder: Path, config: Config, outcomes: Outcomes) -> None:
    """``summary.json``, ``curves.png``, ``confusion.png`` and ``report.html`` in ``folder``."""
    rows = summary(outcomes)
    backend = backends.select(None, torch.device("cpu"), torch.float32, torch.float32).name
    versions = {"kdkernels": kdkernels.__version__, "torch": torch.__version__}
    numbers = {
        "test_accuracy": {
            name: [o.test_accuracy for o in found] for name, found in outcomes.items()
        },
        "summary": {n: {"mean": m, "sample_standard_deviation": s} for n, (m, s) in rows.items()},
        "versions": versions | {"python": platform.python_version()},
        "cpu_backend": backend,
        "threads": torch.get_num_threads(),
    }
    write(folder / "summary.json", json.dumps(numbers, indent=2) + "\n")
    curves = {name: found for name, found in outcomes.items() if found[0].result}
    write(folder / "curves.png", _curves(curves))
    write(folder / "confusion.png", _confusion(outcomes["distilled"]))
    write(folder / "report.html", _page(config, rows, outcomes, versions))


def table(outcomes: Outcomes) -> str:
    """The summary for a terminal."""
    n = len(outcomes["distilled"])
    over = f"mean ± sample standard deviation over {n} seeds" if n > 1 else "one seed"
    lines = [f"test accuracy in per cent, {over}"]
    for name, (mean, spread) in summary(outcomes).items():
        lines.append(f"  {name:<20} {_percent(mean, spread)}")
    return "\n".join(lines)


def _percent(mean: float, spread: float | None) -> str:
    return f"{100 * mean:6.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def _figure(**options: Any) -> Any:
    # The Figure alone, not pyplot: no window system, no global state.
    figure = require("matplotlib.figure", "matplotlib", "train").Figure(
        layout="constrained", **options
    )
    return figure, figure.add_subplot()


def _curves(outcomes: Outcomes) -> bytes:
    """Validation accuracy over the steps, mean and spread over the seeds."""
    figure, axes = _figure(figsize=(7, 4.5))
    for name, found in outcomes.items():
        curves = [[accuracy for _, accuracy in o.result["curve"]] for o in found]
        length = min(map(len, curves))  # a seed that stopped early ends the mean
        steps = [step for step, _ in found[0].result["curve"]][:length]
        points = [mean_and_spread([100 * c[i] for c in curves]) for i in range(length)]
        (line,) = axes.plot(steps, [m for m, _ in points], marker="o", markersize=3, label=name)
        low, high = ([m + sign * (s or 0) for m, s in points] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step of the optimiser", ylabel="validation accuracy (%)")
    axes.set_ylim(top=101)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return _png(figure)


def _confusion(found: list[Outcome]) -> bytes:
    """Test images of all seeds by true and predicted class, in per cent of the true class."""
    counts = torch.tensor([o.confusion for o in found]).sum(0).double()
    share = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    figure, axes = _figure(figsize=(6, 5.2))
    figure.colorbar(axes.imshow(share, cmap="Blues", vmin=0, vmax=100), label="% of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title="distilled student, test images")
    if len(share) <= 20:
        axes.set(xticks=range(len(share)), yticks=range(len(share)))
        for i, j in share.nonzero().tolist():
            value = share[i, j].item()
            axes.text(j, i, f"{value:.0f}" if value >= 1 else "<1", ha="center", va="center",
                      color="white" if value > 50 else "black", fontsize=7)  # fmt: skip
    return _png(figure)


_PAGE = """<!doctype html><meta charset="utf-8"><title>kdkernels: {title}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto }}
td, th {{ padding: .2rem 1rem; border-bottom: 1px solid #ccc; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }}
pre {{ background: #f4f4f4; padding: 1rem; overflow: auto }}</style>
<h1>{title}</h1><p>{text}</p>
<table><tr><th>test accuracy in %</th><th>mean ± spread</th>{seeds}</tr>{rows}</table>
<h2>Curves</h2><img src="curves.png" alt="validation accuracy over the steps">
<h2>Confusion</h2><img src="confusion.png" alt="confusion matrix of the distilled student">
<h2>Configuration</h2><pre>{config}</pre><p>{versions}</p>
"""


def _page(config: Config, rows: Any, outcomes: Outcomes, versions: dict[str, str]) -> str:
    shown = []
    for name, (mean, spread) in rows.items():
        single = "".join(f"<td>{100 * o.test_accuracy:.2f}</td>" for o in outcomes.get(name, []))
        shown.append(f"<tr><td>{name}</td><td>{_percent(mean, spread)}</td>{single}</tr>")
    labelled = config.data.labelled or "all"
    return _PAGE.format(
        title=html.escape(f"{config.teacher.name} → {config.student.name} on {config.data.name}"),
        text=f"The teacher knew all labels of the training images, the student {labelled}. The "
        "spread is the sample standard deviation over the seeds; test images were looked at once.",
        seeds="".join(f"<th>seed {config.first_seed + i}</th>" for i in range(config.seeds)),
        rows="\n".join(shown),
        config=html.escape(dumps(config)),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )
