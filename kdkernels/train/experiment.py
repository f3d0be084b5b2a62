"""What ``kdkernels train`` does: teacher, distilled student and the same student without a teacher.

Per seed the teacher is trained on all labels of the training images, or loaded. The owner of the
student has the same images and ``data.labelled`` of their labels. From the same initial weights,
for as many steps, the student is trained *distilled*, on all images, where those
without a label teach by the teacher's logits alone; *alone*, on the labelled images; and
*smoothed*, alone with label smoothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdkernels.teachers import TopKTeacher
from kdkernels.train import distributed
from kdkernels.train.callbacks import Callback, JsonLines, Progress, TensorBoard, Wandb
from kdkernels.train.checkpoints import Normalize, save_model, write
from kdkernels.train.config import Config, Distill, Model, Student
from kdkernels.train.data import UNLABELLED, Images, Splits, hide_labels, load, to_float
from kdkernels.train.distill import Distillation, Teachers
from kdkernels.train.errors import SetupError, require
from kdkernels.train.evaluation import evaluate
from kdkernels.train.models import build, load_weights
from kdkernels.train.trainer import Trainer, seed_everything

SMOOTHING = 0.1  # of the student "smoothed", unless training.label_smoothing says another


@dataclass
class Outcome:
    """What a model came to: test accuracy in [0, 1], images by true and predicted class, curve."""

    test_accuracy: float
    confusion: list[list[int]]
    result: dict[str, Any]


class Experiment:
    """All runs of a configuration, in a folder where each finds what it has left."""

    def __init__(self, config: Config, folder: Path, say: Callable[[str], None] = print) -> None:
        self.folder, self.say = folder, say
        if config.training.threads:
            torch.set_num_threads(config.training.threads)
        self.splits: Splits = load(config.data, say)
        self.normalize = Normalize(self.splits.mean, self.splits.std)
        # The student alone takes steps of as many images, and they come from a few labelled ones.
        size = min(config.training.batch_size, len(self.splits.train))
        training = config.training.model_copy(update={"batch_size": size})
        self.config = config = config.model_copy(update={"training": training})
        self.steps = max(1, -(-len(self.splits.train) // size))
        self.top_k = min(config.teacher.cache_top_k, len(self.splits.classes))
        self.device = distributed.device(config.training.device)
        self.try_out()

    @torch.no_grad()
    def try_out(self) -> None:
        """Say what is wrong with models and loss now, and not when the teacher has been trained.

        Raises:
            SetupError: see there.
        """
        config, last = self.config, len(self.splits.classes) - 1
        self.student_images(config.first_seed)
        teachers = [self.build(model) for model in (config.teacher, *config.teacher.others)]
        images = self.normalize.to(self.device)(self.splits.train[:2][0].to(self.device))
        labels = torch.tensor([0, last], device=self.device)
        top = TopKTeacher.from_logits(torch.zeros(2, last + 1), self.top_k) if self.top_k else None
        student = self.build(config.student)
        objective = Distillation(student, Teachers(teachers), config, images, top)
        mixed = (labels, 0.5) if config.augment.mixup or config.augment.cutmix else None
        sums = mixed is not None or config.training.accumulate > 1 or distributed.world_size() > 1
        items = (2.0, 2.0, 2.0) if sums else None
        try:
            objective.train().to(self.device)(images, labels, torch.arange(2), mixed, items)
        except RuntimeError as error:  # a backend that cannot run here
            raise SetupError(f"loss: {error}") from error

    def run(self) -> dict[str, list[Outcome]]:
        """Every model of every seed; name to outcomes, one per seed."""
        outcomes: dict[str, list[Outcome]] = {}
        for seed in range(self.config.first_seed, self.config.first_seed + self.config.seeds):
            for name, outcome in self.run_seed(seed).items():
                outcomes.setdefault(name, []).append(outcome)
        return outcomes

    def run_seed(self, seed: int) -> dict[str, Outcome]:
        teachers, found = self.teachers(seed)
        found["distilled"] = self.distilled(seed, teachers)
        if self.config.baselines:
            few = self.student_images(seed)
            few = few.at(few.labels != UNLABELLED)
            smoothing = self.config.training.label_smoothing or SMOOTHING
            for i, (name, value) in enumerate((("alone", 0.0), ("smoothed", smoothing))):
                config = without_teacher(self.config, label_smoothing=value)
                found[name] = self.train(name, seed, 2 + i, config, config.student, None, few)[1]
        return found

    def student_images(self, seed: int) -> Images:
        """The training images with the labels that the student's owner has."""
        labelled = self.config.data.labelled
        return hide_labels(self.splits.train, labelled, seed) if labelled else self.splits.train

    def distilled(self, seed: int, teachers: list[nn.Module]) -> Outcome:
        cached = self.cached(seed, teachers[0]) if self.config.teacher.cache != "none" else None
        config, images = self.config, self.student_images(seed)
        return self.train("distilled", seed, 1, config, config.student, teachers, images, cached)[1]

    def build(self, model: Model) -> nn.Module:
        """The model, with its weights if they are given."""
        made = build(model.name, len(self.splits.classes), self.splits.channels, model.options)
        if model.weights:
            load_weights(made, model.weights)
        return made.to(self.device)

    def teachers(self, seed: int) -> tuple[list[nn.Module], dict[str, Outcome]]:
        """The teachers, loaded or trained, and their outcomes by name."""
        models, found = [], {}
        for i, model in enumerate((self.config.teacher, *self.config.teacher.others)):
            name = "teacher" if i == 0 else f"teacher {i + 1}"
            if model.weights:
                trained = self.build(model)
                found[name] = self.outcome(trained, {})
            else:
                teacher, images = self.config.teacher, self.splits.train
                config = without_teacher(
                    self.config, learning_rate=teacher.learning_rate,
                    epochs=teacher.epochs or self.config.training.epochs,
                ).model_copy(update={"student": Student(name=model.name)})  # fmt: skip
                trained, found[name] = self.train(name, seed, 10 + i, config, model, None, images)
            models.append(trained)
        return models, found

    def train(
        self, name: str, seed: int, purpose: int, config: Config, about: Model,
        teachers: list[nn.Module] | None, images: Images, cached: Any = None,
    ) -> tuple[nn.Module, Outcome]:  # fmt: skip
        """One model, in its own folder; nothing is done there that is done already."""
        folder = self.folder / f"seed{seed}" / name.replace(" ", "-")
        seed_everything(seed, 100 + (purpose if purpose >= 10 else 0))  # students start alike
        model = self.build(about)
        if (folder / "outcome.json").exists():
            load_weights(model, folder / "model.safetensors")
            return model, Outcome(**json.loads((folder / "outcome.json").read_text()))
        trainer = Trainer(
            model, teachers, images, self.splits.validation, config, normalize=self.normalize,
            callbacks=self.callbacks(f"seed {seed} {name}", folder), folder=folder / "checkpoints",
            seed=100 * seed + purpose, steps_per_epoch=self.steps, cached=cached, say=self.say,
        )  # fmt: skip
        outcome = self.outcome(model, asdict(trainer.fit()))
        if distributed.rank() == 0:
            save_model(folder / "model.safetensors", model, self.about(about))
            write(folder / "outcome.json", json.dumps(asdict(outcome)))
        distributed.wait()
        return model, outcome

    def outcome(self, model: nn.Module, result: dict[str, Any]) -> Outcome:
        found = evaluate(model, self.splits.test, self.normalize.to(self.device))
        return Outcome(found.accuracy, found.confusion.tolist(), result)

    def about(self, model: Model) -> dict[str, Any]:
        """What a model file says of itself."""
        splits, data = self.splits, self.config.data.model_dump()
        return {"name": model.name, "options": model.options, "data": data,
                "classes": splits.classes, "mean": splits.mean, "std": splits.std,
                "shape": list(splits.train.images.shape[1:])}  # fmt: skip

    def callbacks(self, name: str, folder: Path) -> list[Callback]:
        if distributed.rank() > 0:
            return []
        found: list[Callback] = [JsonLines(folder / "metrics.jsonl"), TensorBoard(folder)]
        if self.config.wandb:
            found.append(Wandb(self.config.wandb, name, folder))
        return [*found, Progress(name, self.say)]

    def cached(self, seed: int, teacher: nn.Module) -> torch.Tensor | TopKTeacher:
        """The teacher's logits of the training images, computed once and kept in the folder."""
        path = self.folder / f"seed{seed}" / "teacher-logits.safetensors"
        safetensors, top_k = require("safetensors.torch", "safetensors", "train"), self.top_k
        is_there = path.exists()
        distributed.wait()  # or the first process has written it before another has looked
        if not is_there:
            tensors = {"logits": self.logits(teacher).to(getattr(torch, self.config.teacher.cache))}
            if top_k:
                top = TopKTeacher.from_logits(tensors["logits"], top_k)
                tensors = {"values": top.values, "indices": top.indices}
            if distributed.rank() == 0:
                write(path, safetensors.save(tensors))
            distributed.wait()
        tensors = safetensors.load_file(path)
        return TopKTeacher(tensors["values"], tensors["indices"]) if top_k else tensors["logits"]

    @torch.no_grad()
    def logits(self, teacher: nn.Module) -> torch.Tensor:
        model = nn.Sequential(self.normalize, teacher).to(self.device).eval()
        parts = self.splits.train.images.split(256)
        return torch.cat([model(to_float(part).to(self.device)).cpu() for part in parts])


def without_teacher(config: Config, **training: Any) -> Config:
    """The configuration of a model that is trained on labels alone."""
    changed = config.training.model_copy(update=training)
    nothing = {"loss": {}, "distill": Distill(), "schedules": {}}
    return config.model_copy(update={"training": changed, **nothing})


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single value has no spread."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(outcomes: dict[str, list[Outcome]]) -> dict[str, tuple[float, float | None]]:
    """Mean and spread over the seeds of each test accuracy, and of the paired gains."""
    rows = {name: [o.test_accuracy for o in found] for name, found in outcomes.items()}
    for name in ("alone", "smoothed"):
        if name in rows:
            pairs = zip(rows["distilled"], rows[name], strict=True)
            rows[f"gain over {name}"] = [d - a for d, a in pairs]
    return {name: mean_and_spread(values) for name, values in rows.items()}
