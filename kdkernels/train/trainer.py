"""The training loop: one student, with or without teachers, that any interruption may stop."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdkernels.train import distributed
from kdkernels.train.augment import mix, pipeline
from kdkernels.train.callbacks import Callback
from kdkernels.train.checkpoints import Checkpoints, random_states, set_random_states
from kdkernels.train.config import Config
from kdkernels.train.data import UNLABELLED, Labelled, as_dataset, batches
from kdkernels.train.distill import Distillation, Items, Teachers
from kdkernels.train.errors import Interrupted, NonFiniteError, SetupError
from kdkernels.train.evaluation import evaluate


@dataclass
class Result:
    """What a run came to.

    Attributes:
        accuracy: the best on the validation images, in [0, 1]; the student has the weights of then.
        epoch: of the best, from 1 on.
        curve: (steps, validation accuracy) after each epoch.
        stopped_early: whether ``training.patience`` ended the run.
    """

    accuracy: float = -1.0
    epoch: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    stopped_early: bool = False


class Trainer:
    """Trains ``student``, in place, towards the teacher's logits and the labels.

    Args:
        student: images (N, channels, H, W) to logits (N, C).
        teacher: the same, a sequence of such, or None to train on labels alone. It is put into eval
            mode and its parameters no longer require grad.
        train_data: a dataset of (image, label), or the tensors (N, channels, H, W) and (N,). Pixels
            are uint8, or floating point in [0, 1]. The label -100 is no label.
        val_data: the same, with all labels; chooses the epoch whose weights are kept.
        config: sections ``augment``, ``loss``, ``distill``, ``schedules`` and ``training`` count,
            ``student.freeze`` and ``data.workers``.
        normalize: applied to the images in [0, 1] before the models. Default: nothing.
        callbacks: told what happens.
        folder: where checkpoints are kept, and found again if there are any. None: nowhere.
        steps_per_epoch: default: one pass over the training images.
        cached: logits of the teacher for all training images.
        say: where messages go.

    Example:
        >>> config = Config(training={"epochs": 20}, loss={"temperature": 2.0})
        >>> trainer = Trainer(student, teacher, (images, labels), (more, their_labels), config)
        >>> trainer.fit().accuracy
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None,
        train_data: Labelled,
        val_data: Labelled,
        config: Config | None = None,
        *,
        normalize: nn.Module | None = None,
        callbacks: Sequence[Callback] = (),
        folder: str | Path | None = None,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        cached: Any = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.config = config or Config()
        self.train_data, self.val_data = as_dataset(train_data), as_dataset(val_data)
        self.callbacks, self.seed, self.say = list(callbacks), seed, say
        self.options = training = self.config.training
        self.device = distributed.device(training.device)
        self.normalize = (normalize or nn.Identity()).to(self.device)
        size, world = training.batch_size, distributed.world_size()
        if size < 2 * world or len(self.train_data) < 2 * world:
            raise SetupError("batch normalisation needs two images per process, in every batch")
        self.steps_per_epoch = steps_per_epoch or max(1, -(-len(self.train_data) // size))
        first = next(batches(self.train_data, [[0, 1]], 0))[0].to(self.device)
        self.augment = pipeline(self.config.augment, first.shape[1])
        models = [teacher] if isinstance(teacher, nn.Module) else teacher
        teachers = Teachers(models).to(self.device) if models else None
        seed_everything(seed, 0)
        self.objective = Distillation(
            student.to(self.device), teachers, self.config, self.normalize(first), cached
        ).to(self.device)
        self.optimizer = make_optimizer(self.objective.trained(), training)
        self.module = distributed.wrap(self.objective, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp == "float16")
        average = get_ema_multi_avg_fn(training.ema)
        self.ema = AveragedModel(student, multi_avg_fn=average) if training.ema else None
        self.checkpoints = Checkpoints(Path(folder), training.keep) if folder else None
        self.result = Result()
        self.epoch = self.batch = self.step = self.skipped = 0
        self._best: dict[str, Tensor] = {}
        self._signal = 0

    @property
    def model(self) -> nn.Module:
        """The student, or the average of its weights: what is evaluated and kept."""
        return self.ema.module if self.ema is not None else self.objective.student

    def fit(self) -> Result:
        """Train to the end, from the last checkpoint on if the folder holds one.

        Raises:
            NonFiniteError: a loss was NaN or infinite and ``training.nonfinite`` is ``"stop"``.
            Interrupted: SIGINT or SIGTERM came; fit() of the same folder goes on where it was.
            StorageError, SetupError: see there.
        """
        state = self.checkpoints.latest(self.say) if self.checkpoints else None
        if state is None:
            seed_everything(self.seed, distributed.rank())
        else:
            self._load_state(state)
        with ExitStack() as started:
            for callback in self.callbacks:
                callback.start(self)
                started.callback(callback.close)
            started.enter_context(self._signals())
            while self.epoch < self.options.epochs and not self.result.stopped_early:
                self._train_epoch()
                self._end_epoch()
        if self._best:
            self.model.load_state_dict(self._best)
        if self.ema is not None:
            self.objective.student.load_state_dict(self.ema.module.state_dict())
        self.objective.eval()
        return self.result

    def _train_epoch(self) -> None:
        rank, world = distributed.rank(), distributed.world_size()
        size, seed = self.options.batch_size, self.seed * 1_000_003 + self.epoch
        order = epoch_order(len(self.train_data), self.steps_per_epoch, size, seed, 2 * world)
        rest = [batch[rank::world] for batch in order[self.batch :]]
        began = time.perf_counter()
        for images, labels, index in batches(self.train_data, rest, self.config.data.workers):
            self.objective.schedule(self.epoch + self.batch / len(order))
            rate = self.options.learning_rate * self._rate(self.epoch + self.batch / len(order))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            # As many in every process, or they wait for each other, and no part of one image.
            parts = min(self.options.accumulate, len(order[self.batch]) // (2 * world))
            terms = self._train_step(images.to(self.device), labels.to(self.device), index, parts)
            self.step, self.batch = self.step + 1, self.batch + 1
            record = {"step": self.step, "epoch": self.epoch + 1, **terms, "learning_rate": rate}
            now = time.perf_counter()
            speed, began = len(images) * world / (now - began), now
            for callback in self.callbacks:
                callback.step(self, record, speed)
            stop = distributed.largest(self._signal)
            every = self.options.checkpoint_every
            if self.batch < len(order) and (stop or (every and self.step % every == 0)):
                self._save(stop)

    def _rate(self, epoch: float) -> float:
        """The factor of the learning rate, in [0, 1]."""
        options = self.options
        if epoch < options.warmup:
            return (epoch + 1 / self.steps_per_epoch) / (options.warmup + 1 / self.steps_per_epoch)
        share = (epoch - options.warmup) / max(options.epochs - options.warmup, 1e-9)
        return {
            "constant": 1.0,
            "linear": 1 - share,
            "cosine": (1 + math.cos(math.pi * share)) / 2,
            "step": 0.1 ** ((share >= 0.5) + (share >= 0.75)),
        }[options.schedule]

    def _train_step(
        self, images: Tensor, labels: Tensor, index: Tensor, parts: int
    ) -> dict[str, float]:
        """One step of the optimiser, or none where a loss is not finite and may be skipped."""
        self.module.train()
        images, mixed = mix(self.augment(images), labels, self.config.augment)
        if self.config.augment.fgsm:
            images = self._adversarial(images, labels, index, mixed)
        images = self.normalize(images)
        skips = self.options.nonfinite == "skip"
        buffers = [buffer.clone() for buffer in self.objective.buffers()] if skips else []
        self.optimizer.zero_grad(set_to_none=True)
        items = self._items(labels, mixed, parts)
        totals: dict[str, Tensor] = {}
        kind = torch.float16 if self.options.amp == "float16" else torch.bfloat16
        for part in torch.arange(len(images), device=self.device).tensor_split(parts):
            others = None if mixed is None else (mixed[0][part], mixed[1])
            with torch.autocast(self.device.type, kind, enabled=self.options.amp != "off"):
                terms = self.module(images[part], labels[part], index[part.cpu()], others, items)
            self.scaler.scale(terms["loss"]).backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + value.detach()
        values = distributed.mean(totals)
        if self._gradient_is_finite(values):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update_parameters(self.objective.student)
        else:  # batch norm has seen what made the loss what it is
            for buffer, before in zip(self.objective.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return values

    def _items(self, labels: Tensor, mixed: Any, parts: int) -> Items:
        """By what the sums over images that are distilled, that have a label, and over all are
        divided, in each process."""
        world = distributed.world_size()
        if world == 1 and parts == 1 and mixed is None:
            return None  # a mean
        counts = torch.full((3,), len(labels), device=self.device, dtype=torch.float64)
        weight = self.objective.loss_fn.weight
        known = labels[labels != UNLABELLED]
        counts[1] = len(known) if weight is None else weight[known].sum()
        if not self.objective.loss_fn.distill_ignored:
            counts[0] = len(known)
        distilled, labelled, images = (distributed.sum(counts) / world).tolist()
        return max(distilled, 1 / world), max(labelled, 1e-6), images

    def _adversarial(self, images: Tensor, labels: Tensor, index: Tensor, mixed: Any) -> Tensor:
        """A share of the images, moved along the sign of the gradient of their loss."""
        self.objective.eval()  # batch norm is not to see these images twice
        images = images.detach().requires_grad_()
        terms = self.objective(self.normalize(images), labels, index, mixed, None)
        (gradient,) = torch.autograd.grad(terms["loss"], images)
        self.module.train()
        count = round(self.config.augment.fgsm_share * len(images))
        step = self.config.augment.fgsm * gradient.sign()
        step[count:] = 0  # the order of a batch is random already
        return (images.detach() + step).clamp(0, 1)

    def _gradient_is_finite(self, values: dict[str, float]) -> bool:
        """Clip the gradient; whether the step can be made. A scaler leaves steps out by itself, but
        below a scale of 1 it is not to blame."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.options.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.options.clip, norm)
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        scales = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not wrong and not scales and not math.isfinite(norm.item()):
            wrong = {"gradient": norm.item()}
        if not wrong:
            return True
        shown = ", ".join(f"{name} {value}" for name, value in wrong.items())
        if self.options.nonfinite == "stop":
            raise NonFiniteError(f"step {self.step + 1} has {shown}; {self._last_good()}")
        self.skipped += 1
        self.say(f"step {self.step + 1} left out: it has {shown}")
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update()
        return False

    def _last_good(self) -> str:
        return f"last good checkpoint: {self.checkpoints or 'none, no folder was given'}"

    def _end_epoch(self) -> None:
        found = evaluate(self.model, self.val_data, self.normalize, self.options.batch_size)
        self.epoch, self.batch = self.epoch + 1, 0
        result = self.result
        result.curve.append((self.step, found.accuracy))
        if found.accuracy > result.accuracy:
            result.accuracy, result.epoch = found.accuracy, self.epoch
            self._best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            if self.checkpoints and distributed.rank() == 0:
                self.checkpoints.save_best(self._best)
        patience = self.options.patience
        result.stopped_early = bool(patience) and self.epoch - result.epoch >= patience
        record = {"step": self.step, "epoch": self.epoch, "validation_loss": found.loss,
                  "validation_accuracy": found.accuracy}  # fmt: skip
        for callback in self.callbacks:
            callback.epoch(self, record)
        self._save(distributed.largest(self._signal))

    def _save(self, stop: int) -> None:
        """Write a checkpoint; after it, act on a signal that any process has got."""
        if self.checkpoints and distributed.rank() == 0:
            self.checkpoints.save(self.step, self._state())
        if stop:
            distributed.wait()
            name = signal.Signals(stop).name
            raise Interrupted(stop, f"{name} at step {self.step}: {self._last_good()}")

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own."""
        parts = {"objective": self.objective, "optimizer": self.optimizer, "scaler": self.scaler}
        named = {f"callback {i}": callback for i, callback in enumerate(self.callbacks)}
        return parts | named | ({"ema": self.ema} if self.ema is not None else {})

    def _state(self) -> dict[str, Any]:
        return {
            "place": [self.epoch, self.batch, self.step, self.skipped],
            "result": vars(self.result),
            "best": self._best,
            "random": random_states(),
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch, self.step, self.skipped = state["place"]
        self.result, self._best = Result(**state["result"]), state["best"]
        try:
            for name, part in self._parts().items():
                if name in state["parts"]:
                    part.load_state_dict(state["parts"][name])
        except (RuntimeError, ValueError) as error:
            raise SetupError(f"{self.checkpoints} is of another student") from error
        if distributed.rank() == 0:
            set_random_states(state["random"])
        else:  # the state is the first process's, and no other is to draw the same numbers
            seed_everything(self.seed + self.step, distributed.rank())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM are noted, and acted on between two steps."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets no other thread have them
            return

        def note(signum: int, frame: Any) -> None:
            self._signal = signum

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def seed_everything(seed: int, rank: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch; each process draws its own numbers."""
    mixed = (seed * 1009 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def make_optimizer(parameters: list[nn.Parameter], options: Any) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 0], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() == 0], "weight_decay": 0.0},  # a temperature
    ]
    if options.optimizer == "sgd":
        momentum = {"momentum": options.momentum, "nesterov": options.momentum > 0}
        return torch.optim.SGD(groups, options.learning_rate, **momentum)
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, options.learning_rate)


def epoch_order(n: int, steps: int, size: int, seed: int, smallest: int) -> list[list[int]]:
    """The images of each batch of an epoch: all once in random order, then again if steps are left.

    A last batch of fewer than ``smallest`` is a part of the one before it.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(n, generator=generator) for _ in range(-(-steps * size // n))]
    )
    # One pass is one pass: the last batch is what is left.
    needed = n if steps == -(-n // size) else steps * size
    found = [part.tolist() for part in order[:needed].split(size)]
    if len(found) > 1 and len(found[-1]) < smallest:
        found[-2:] = [found[-2] + found[-1]]
    return found
