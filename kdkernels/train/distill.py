"""What a training step minimises: FusedKDLoss, and what compares the insides of the models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.teachers import TopKTeacher
from kdkernels.train.config import Config, make_loss
from kdkernels.train.data import UNLABELLED
from kdkernels.train.errors import SetupError, nearest
from kdkernels.train.models import matching

Mixed = tuple[Tensor, float] | None
Items = tuple[float, float, float] | None


class Teachers(nn.Module):
    """Models that only look: in eval mode and without gradients, whoever calls ``train()``."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.models.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Teachers:
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        return [model(images) for model in self.models]


class _Tap:
    """The last output of a module inside a model."""

    output: Tensor | None

    def __init__(self, model: nn.Module, path: str) -> None:
        paths = dict(model.named_modules())
        if path not in paths:
            raise SetupError(f"no module {path!r} in the model{nearest(path, paths)}")
        self.path, self.output = path, None
        paths[path].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not isinstance(output, Tensor) or output.dim() not in (2, 4):
            raise SetupError(f"the output of {self.path} is neither (N, C, H, W) nor (N, C)")
        self.output = output

    def take(self) -> Tensor:
        """The output, which is not kept: nobody could copy a model that holds on to a graph."""
        output, self.output = self.output, None
        if output is None:
            raise SetupError(f"the module {self.path} has no part in the model's logits")
        return output


class Distillation(nn.Module):
    """Student, loss, and what is trained with them; images and labels to the terms of the loss.

    The teachers are no part of it: neither ``train()``, nor an optimiser, nor a state_dict finds
    them. Without teachers it is the cross entropy.

    Args:
        student: images (N, channels, H, W) to logits (N, C); changed in place.
        teachers: the same to their own logits (N, C).
        example: some images, to learn the shapes of hints from.
        cached: the teacher's logits of all training images, in the place of asking it.

    Raises:
        SetupError: modules of hints, attention or freeze that do not exist or do not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Teachers | None,
        config: Config,
        example: Tensor,
        cached: Tensor | TopKTeacher | None = None,
    ) -> None:
        super().__init__()
        self.student, self.config, self.cached = student, config, cached
        self._teachers = (teachers,)  # a tuple, which nn.Module does not look into
        self.loss_fn = make_loss(config.loss if teachers else {})
        distill = config.distill
        self.weights = {"hint": distill.hint_weight, "attention": distill.attention_weight}
        frozen = matching(student, config.student.freeze)
        self._frozen = tuple(student.get_submodule(path) for path in frozen)
        for module in self._frozen:
            module.requires_grad_(False)
        self._taps: dict[str, list[tuple[_Tap, _Tap]]] = {"hint": [], "attention": []}
        self.projections = nn.ModuleList()
        self.log_temperature: nn.Parameter | None = None
        if teachers is not None:
            self._look_inside(student, teachers, example)
            if distill.learn_temperature:
                start = torch.tensor(float(self.loss_fn.temperature))
                self.log_temperature = nn.Parameter(start.log())
        if not self.trained():
            raise SetupError("student.freeze leaves nothing to train")

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _look_inside(self, student: nn.Module, teachers: Teachers, example: Tensor) -> None:
        distill = self.config.distill
        for kind, pairs in (("hint", distill.hints), ("attention", distill.attention)):
            for path, their_path in pairs.items():
                tapped = (_Tap(student, path), _Tap(teachers.models[0], their_path))
                self._taps[kind].append(tapped)
        _check("student", student.eval(), example)
        for teacher in teachers.models:
            _check("teacher", teacher, example)
        for kind, taps in self._taps.items():
            for ours, theirs in taps:
                shapes = [tap.take().shape for tap in (ours, theirs)]
                dims = {len(shape) for shape in shapes}
                if dims != {4} and (kind == "attention" or dims != {2}):
                    raise SetupError(f"{kind} {ours.path}: both outputs must be (N, C, H, W)")
                if kind == "hint":
                    sizes = shapes[0][1], shapes[1][1]
                    projection = nn.Conv2d(*sizes, 1) if dims == {4} else nn.Linear(*sizes)
                    self.projections.append(projection)

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        for module in self._frozen:  # batch norm would move its statistics
            module.eval()
        return self

    def schedule(self, epoch: float) -> None:
        """Set what changes over the epochs: piecewise linear between the points."""
        for name, points in self.config.schedules.items():
            epochs, values = zip(*points, strict=True)
            value = float(np.interp(epoch, epochs, values))
            if name.endswith("_weight"):
                self.weights[name.removesuffix("_weight")] = value
            else:
                setattr(self.loss_fn, name, value)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        mixed: Mixed = None,
        items: Items = None,
    ) -> dict[str, Tensor]:
        """The terms of a batch, of which ``loss`` is minimised; the others are for people.

        Args:
            index: the numbers of the images in the training set, which a cached teacher goes by.
            mixed: other labels and the share of the first ones, of images that were mixed.
            items: by which the sums over images that are distilled, over labelled images and over
                all are divided, if not by those of this batch.
        """
        share = len(images) / items[2] if items else 1.0
        logits = self.student(images)
        if self._teachers[0] is None:
            terms = self._supervised(logits, labels, mixed, items)
        else:
            terms = self._distilled(logits, self._teacher(images, index), labels, mixed, items)
        for kind, compare in (("hint", self._hint), ("attention", self._attention)):
            if self._taps[kind]:
                terms[kind] = compare() * share
                terms["loss"] = terms["loss"] + self.weights[kind] * terms[kind]
        if self.log_temperature is not None:
            terms["temperature"] = self.log_temperature.detach().exp() * share
        return terms

    def _teacher(self, images: Tensor, index: Tensor) -> Tensor | TopKTeacher | list[Tensor]:
        if self.cached is not None:
            return self.cached[index].to(images.device)
        logits = self._teachers[0](images)  # type: ignore[misc]
        return logits[0] if len(logits) == 1 else logits  # type: ignore[no-any-return]

    def _supervised(
        self, logits: Tensor, labels: Tensor, mixed: Mixed, items: Items
    ) -> dict[str, Tensor]:
        labelled = items[1] if items else max(1, int((labels != UNLABELLED).sum()))
        cross_entropy = partial(
            F.cross_entropy, logits.float(), reduction="sum", ignore_index=UNLABELLED,
            label_smoothing=self.config.training.label_smoothing,
        )  # fmt: skip
        if mixed is None:
            return {"loss": cross_entropy(labels) / labelled}
        both = mixed[1] * cross_entropy(labels) + (1 - mixed[1]) * cross_entropy(mixed[0])
        return {"loss": both / labelled}

    def _distilled(
        self, logits: Tensor, teacher: Any, labels: Tensor, mixed: Mixed, items: Items
    ) -> dict[str, Tensor]:
        if self.log_temperature is not None:
            setattr(self.loss_fn, "temperature", self.log_temperature.exp())  # noqa: B010
        if mixed is None:
            return self._loss(logits, teacher, labels, items)
        # The loss is linear in the shares of the two labels; the divergence has none of them.
        terms = []
        for y, share in ((labels, mixed[1]), (mixed[0], 1 - mixed[1])):
            weight = torch.full_like(y, share, dtype=torch.float32)
            terms.append(self._loss(logits, teacher, y, items, sample_weight=weight))
        return {name: terms[0][name] + terms[1][name] for name in terms[0]}

    def _loss(
        self, logits: Tensor, teacher: Any, labels: Tensor, items: Items, **more: Any
    ) -> dict[str, Tensor]:
        counts = items and items[:2]
        try:
            return self.loss_fn(logits, teacher, labels, num_items=counts, **more)._asdict()  # type: ignore[no-any-return]
        except (TypeError, ValueError, IndexError) as error:  # options, shapes, labels
            raise SetupError(f"loss: {error}") from error

    def _hint(self) -> Tensor:
        """Mean squared distance of the projected student's features to the teacher's."""
        losses = []
        for (ours, theirs), projection in zip(self._taps["hint"], self.projections, strict=True):
            student, teacher = projection(ours.take()), theirs.take()
            if teacher.dim() == 4:
                student = _as_large_as(teacher, student)
            losses.append(F.mse_loss(student.float(), teacher.float()))
        return torch.stack(losses).sum()

    def _attention(self) -> Tensor:
        """Mean squared distance of the normalised maps of the features' energy, halved."""
        losses = []
        for ours, theirs in self._taps["attention"]:
            student, teacher = (tap.take().float().square().mean(1) for tap in (ours, theirs))
            student = _as_large_as(teacher, student)
            maps = [F.normalize(energies.flatten(1)) for energies in (student, teacher)]
            losses.append((maps[0] - maps[1]).square().mean() / 2)
        return torch.stack(losses).sum()


@torch.no_grad()
def _check(name: str, model: nn.Module, images: Tensor) -> None:
    """Raise SetupError where a model is none from these images to logits."""
    try:
        logits = model(images)
    except SetupError:
        raise
    except Exception as error:  # whatever a model makes of images that it does not take
        shape = tuple(images.shape[1:])
        raise SetupError(f"the {name} does not take images of {shape}: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), logits.shape[-1]):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SetupError(f"the {name} returns {found} and not the logits (N, C) of N images")


def _as_large_as(image: Tensor, other: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return F.adaptive_avg_pool2d(other, (height, width))
