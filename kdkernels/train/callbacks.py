"""Who is told what happens in a run: files, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkernels.train.errors import StorageError, require

if TYPE_CHECKING:
    from kdkernels.train.trainer import Trainer


class Callback:
    """Override what is of interest; the trainer itself may be looked at, and changed.

    ``record`` holds numbers by name: ``step``, ``epoch``, and after a step the terms of the loss
    and the learning rate, after an epoch ``validation_loss`` and ``validation_accuracy``. What
    ``state_dict`` returns is kept in checkpoints: plain data and tensors. ``close`` follows every
    ``start``.
    """

    def start(self, trainer: Trainer) -> None: ...

    def step(self, trainer: Trainer, record: dict[str, Any], images_per_second: float) -> None: ...

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class JsonLines(Callback):
    """One JSON object per line; a run that goes on from a checkpoint writes what it would have."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0

    def start(self, trainer: Trainer) -> None:
        self._write(b"")

    def step(self, trainer: Trainer, record: dict[str, Any], images_per_second: float) -> None:
        if record["step"] % trainer.options.log_every == 0:
            self.epoch(trainer, record)

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        finite = {name: x if math.isfinite(x) else None for name, x in record.items()}
        self._write((json.dumps(finite) + "\n").encode())  # JSON has no NaN

    def _write(self, line: bytes) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                self.size = min(self.size, file.tell())  # less, if the machine went down
                file.truncate(self.size)  # lines of steps that come again
                file.write(line)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror}") from error
        self.size += len(line)

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]


class TensorBoard(Callback):
    """Scalars for ``tensorboard --logdir``, by the numbers of the steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        require("tensorboard", "tensorboard", "train")

    def start(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=trainer.step + 1)

    def step(self, trainer: Trainer, record: dict[str, Any], images_per_second: float) -> None:
        if record["step"] % trainer.options.log_every == 0:
            self.epoch(trainer, {**record, "images_per_second": images_per_second})

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        for name in record.keys() - {"step", "epoch"}:
            self.writer.add_scalar(name, record[name], record["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb(TensorBoard):
    """The same for Weights & Biases."""

    def __init__(self, project: str, name: str, folder: Path) -> None:
        self.wandb = require("wandb", "wandb", "wandb")
        self.options = {"project": project, "name": name, "dir": str(folder)}

    def start(self, trainer: Trainer) -> None:
        self.run = self.wandb.init(config=trainer.config.model_dump(), **self.options)

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.run.log(record, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def _shown(record: dict[str, Any]) -> str:
    left_out = ("step", "epoch", "learning_rate")
    return "  ".join(
        f"{name} {value:.4f}" for name, value in record.items() if name not in left_out
    )


class Progress(Callback):
    """A bar with terms, throughput and the time left on a terminal; a line per epoch elsewhere."""

    def __init__(self, name: str, say: Callable[[str], None] = print) -> None:
        self.name, self.say, self.last = name, say, ""
        self.bar: Any = None

    def start(self, trainer: Trainer) -> None:
        steps = trainer.options.epochs * trainer.steps_per_epoch
        if sys.stdout.isatty():
            rich = require("rich.progress", "rich", "train")
            columns = ("{task.description:<24}", rich.BarColumn(), rich.MofNCompleteColumn(),
                       rich.TimeRemainingColumn(), "{task.fields[terms]}")  # fmt: skip
            self.bar = rich.Progress(*columns)
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=steps, completed=trainer.step, terms="")

    def step(self, trainer: Trainer, record: dict[str, Any], images_per_second: float) -> None:
        self.last = f"{_shown(record)}  {images_per_second:.0f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"], terms=self.last)

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if self.bar is None:
            place = f"epoch {record['epoch']}/{trainer.options.epochs}"
            accuracy = f"validation {record['validation_accuracy']:.1%}"
            self.say(f"{self.name:<24} {place:<12} {self.last}  {accuracy}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
