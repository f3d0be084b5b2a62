"""The experiment: what is distillation worth to someone who has few labels?

Per seed, a teacher is trained on the whole labelled training split. The owner of the student has
the same images but only ``labelled`` of their labels. The student is trained twice from the same
initial weights, for the same number of steps and with the same batch size: alone, on the labelled
images, and distilled, on all images, where unlabelled ones teach by the teacher's logits alone.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import kdkernels
from kdkernels import backends
from kdkernels.train import checkpoints
from kdkernels.train.data import Images, Splits, batches, hide_labels, labelled_only
from kdkernels.train.models import MODELS
from kdkernels.train.progress import Progress
from kdkernels.train.trainer import (
    Curve,
    Distillation,
    Objective,
    Recipe,
    accuracy,
    fit,
    supervised,
)

TEACHER, ALONE, DISTILLED = NAMES = ("teacher", "student alone", "student distilled")


@dataclass(frozen=True)
class Preset:
    """What suits a data set. Every number was chosen on the validation split."""

    steps: int
    labelled: int
    stem_stride: int  # 2 makes images of 28x28 pixels a quarter of the work
    shift: int  # pixels by which training images move at most
    batch_size: int = 64
    teacher_learning_rate: float = 1e-2
    student_learning_rate: float = 2e-2  # the best one for the student alone
    weight_decay: float = 1e-2


PRESETS = {
    "digits": Preset(steps=600, labelled=50, stem_stride=1, shift=1),
    "mnist5k": Preset(steps=400, labelled=50, stem_stride=2, shift=2),
}


@dataclass(frozen=True)
class Settings:
    """One comparison: what the command line varies, and the preset of the data set."""

    data: str
    seeds: int
    steps: int
    labelled: int
    temperature: float
    alpha: float
    preset: Preset


@dataclass
class Outcome:
    """What one seed came to, by model: test accuracy in [0, 1] and validation curve."""

    seed: int
    test_accuracy: dict[str, float]
    curves: dict[str, Curve]


def compare(settings: Settings, splits: Splits, folder: Path, progress: Progress) -> list[Outcome]:
    """Run every seed; ``folder`` gets ``student-seed<n>.pt``, the distilled students."""
    return [
        compare_seed(settings, splits, seed, folder, progress) for seed in range(settings.seeds)
    ]


def model_options(settings: Settings, splits: Splits) -> dict[str, int]:
    """The keyword arguments of both models."""
    classes = len(splits.train.labels.unique())
    return {"classes": classes, "stem_stride": settings.preset.stem_stride}


def compare_seed(
    settings: Settings, splits: Splits, seed: int, folder: Path, progress: Progress
) -> Outcome:
    """Train the three models of one seed, test each once and save the distilled student."""
    preset = settings.preset
    options = model_options(settings, splits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher, alone = MODELS["resnet"](**options), MODELS["mobilenet"](**options)
    distilled = copy.deepcopy(alone)  # the same initial weights
    few = hide_labels(splits.train, settings.labelled, _generator(seed, 0))

    def train(
        name: str, model: nn.Module, objective: Objective, source: Images, learning_rate: float
    ) -> Curve:
        stream = _generator(seed, NAMES.index(name) + 1)
        drawn = batches(source, preset.batch_size, preset.shift, stream)
        recipe = Recipe(settings.steps, learning_rate, preset.weight_decay)
        run = f"seed {seed} {name}"
        return fit(run, model, objective, drawn, recipe, splits.validation, progress)

    curves = {}
    curves[TEACHER] = train(
        TEACHER, teacher, supervised, splits.train, preset.teacher_learning_rate
    )
    rate = preset.student_learning_rate
    curves[ALONE] = train(ALONE, alone, supervised, labelled_only(few), rate)
    distil = Distillation(teacher, settings.temperature, settings.alpha)
    curves[DISTILLED] = train(DISTILLED, distilled, distil, few, rate)

    models = zip(NAMES, (teacher, alone, distilled), strict=True)
    test_accuracy = {name: accuracy(model, splits.test) for name, model in models}
    checkpoints.save(
        folder / f"student-seed{seed}.pt",
        distilled,
        {"name": "mobilenet", **options},
        {
            "settings": asdict(settings),
            "seed": seed,
            "test_accuracy": test_accuracy[DISTILLED],
            "kdkernels": kdkernels.__version__,
        },
    )
    return Outcome(seed, test_accuracy, curves)


def _generator(seed: int, purpose: int) -> torch.Generator:
    # A stream for every purpose: what one run draws does not depend on another run.
    return torch.Generator().manual_seed(1000 * seed + purpose)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single value has no spread."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, float | None]]:
    """Mean and spread over the seeds of each model's test accuracy, and of the paired gain."""
    rows = {name: [o.test_accuracy[name] for o in outcomes] for name in NAMES}
    rows["gain"] = [d - a for d, a in zip(rows[DISTILLED], rows[ALONE], strict=True)]
    return {name: mean_and_spread(values) for name, values in rows.items()}


def save_metrics(
    path: Path, settings: Settings, splits: Splits, outcomes: Sequence[Outcome]
) -> None:
    """Write everything that was measured, and with what, as JSON."""
    backend = backends.select(None, torch.device("cpu"), torch.float32, torch.float32).name
    metrics = {
        "settings": asdict(settings),
        "split": {name: len(part) for name, part in splits._asdict().items()},
        "seeds": [asdict(outcome) for outcome in outcomes],
        "summary": {
            name: {"mean": mean, "sample_standard_deviation": spread}
            for name, (mean, spread) in summary(outcomes).items()
        },
        "backend": backend,
        "threads": torch.get_num_threads(),
        "versions": {
            "kdkernels": kdkernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    text = json.dumps(metrics, indent=2) + "\n"
    checkpoints.write(path, lambda aside: aside.write_text(text))
