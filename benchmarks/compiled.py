"""``python -m benchmarks.compiled``: a step under torch.compile, with our loss in it.

Beside it the same step with the eager formula, compiled as well, and with our loss in eager mode.
The logits come from a linear layer, so that there is something to compile around the loss. Writes
``benchmarks/results/<device>-compiled.md``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.gpu_results import table
from benchmarks.providers import ALPHA, eager
from benchmarks.readme import one_line
from benchmarks.results import stem
from benchmarks.timing import Step, interleaved, spread
from kdkernels import FusedKDLoss

RESULTS = Path(__file__).parent / "results"
SHAPES = [(128, 100), (512, 32000)]
NAMES = ("kdkernels, compiled", "kdkernels, eager", "formula, compiled")
FEATURES, TEMPERATURE = 16, 4.0  # few features: the loss is most of the step


class Model(nn.Module):
    def __init__(self, classes: int, loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.loss_fn = nn.Linear(FEATURES, classes), loss_fn

    def forward(self, features: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss_fn(self.head(features), teacher, labels)
        return loss


def _eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return eager(student, teacher, labels, TEMPERATURE)


def measure(rows: int, classes: int, seconds: float) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    features, teacher = (
        torch.randn(rows, width, generator=generator) for width in (FEATURES, classes)
    )
    labels = torch.randint(classes, (rows,), generator=generator)
    ours = FusedKDLoss(temperature=TEMPERATURE, alpha=ALPHA)
    models = (
        torch.compile(Model(classes, ours), fullgraph=True),
        Model(classes, ours),
        torch.compile(Model(classes, _eager), fullgraph=True),
    )

    def step(model: nn.Module) -> None:
        model.zero_grad()
        model(features, teacher, labels).backward()

    steps = {
        name: Step(functools.partial(step, model))
        for name, model in zip(NAMES, models, strict=True)
    }
    times = {k: spread(turns)["seconds"] for k, turns in interleaved(steps, seconds).items()}
    cells = [f"{1e3 * seconds:.3g} ms" for seconds in times.values()]
    return [f"({rows}, {classes})", *cells, f"{times[NAMES[2]] / times[NAMES[0]]:.2f}×"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each shape")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    arguments = parser.parse_args()
    known = environment()
    header = [
        "step",
        "kdkernels, compiled",
        "kdkernels, eager",
        "formula, compiled",
        "formula / ours",
    ]
    rows = []
    for shape in SHAPES:
        rows.append(measure(*shape, arguments.seconds))
        print(*rows[-1], sep="\t", flush=True)
    if arguments.write:
        text = "\n\n".join(
            [
                "# A compiled step",
                f"Linear layer of {FEATURES} features, loss, backward; float32, medians in turns. "
                + one_line({"environment": known}),
                table(header, rows),
            ]
        )
        (RESULTS / f"{stem(known)}-compiled.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
