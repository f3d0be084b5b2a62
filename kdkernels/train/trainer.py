"""The training loop that teacher, student alone and distilled student share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.modules import FusedKDLoss
from kdkernels.reference import KDTerms
from kdkernels.train import TrainError
from kdkernels.train.data import Images
from kdkernels.train.progress import Progress

EVALUATIONS = 20  # points on a curve


@dataclass(frozen=True)
class Recipe:
    """How a run is optimised: AdamW whose learning rate falls to zero along a cosine."""

    steps: int
    learning_rate: float
    weight_decay: float


@dataclass
class Curve:
    """Validation accuracy after so many optimiser steps."""

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


Objective = Callable[[nn.Module, Images], dict[str, Tensor]]
"""What a run minimises: the model and a batch to its terms, of which ``loss`` is minimised."""


def supervised(model: nn.Module, batch: Images) -> dict[str, Tensor]:
    """Cross entropy with the labels alone."""
    return {"loss": F.cross_entropy(model(batch.images), batch.labels)}


class Distillation:
    """FusedKDLoss towards a frozen teacher; rows labelled UNLABELLED teach by the teacher alone.

    The teacher sees the very images the student sees, shifts included. It is in eval mode and runs
    without gradient, so neither its weights nor its batch-norm statistics move.
    """

    def __init__(self, teacher: nn.Module, temperature: float, alpha: float) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.loss = FusedKDLoss(temperature, alpha, distill_ignored=True, return_terms=True)

    def __call__(self, student: nn.Module, batch: Images) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_logits = self.teacher(batch.images)
        terms = self.loss(student(batch.images), teacher_logits, batch.labels)
        assert isinstance(terms, KDTerms)
        return terms._asdict()


def fit(
    name: str,
    model: nn.Module,
    objective: Objective,
    batches: Iterator[Images],
    recipe: Recipe,
    validation: Images,
    progress: Progress,
) -> Curve:
    """Train ``model`` in place; the objective's own parameters (a teacher) are left alone.

    Raises:
        TrainError: the loss of a step is NaN or infinite; the step is named.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    evaluate_every = max(1, recipe.steps // EVALUATIONS)
    curve = Curve()
    progress.start(name, recipe.steps)
    for step in range(1, recipe.steps + 1):
        model.train()
        terms = objective(model, next(batches))
        values = {term: value.item() for term, value in terms.items()}
        if not math.isfinite(values["loss"]):
            shown = ", ".join(f"{term} {value}" for term, value in values.items())
            raise TrainError(f"{name}: step {step} of {recipe.steps} has {shown}; stopped")
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        schedule.step()
        progress.step(step, values)
        if step % evaluate_every == 0 or step == recipe.steps:
            curve.steps.append(step)
            curve.accuracy.append(accuracy(model, validation))
            progress.evaluated(step, curve.accuracy[-1])
    return curve


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """The share of images classified right, in [0, 1]; leaves the model in eval mode."""
    model.eval()
    predicted = torch.cat([model(part).argmax(1) for part in images.images.split(512)])
    return (predicted == images.labels).float().mean().item()
