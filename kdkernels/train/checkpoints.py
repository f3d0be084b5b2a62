"""Files written whole or not at all; checkpoints, and models that can be used after training."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kdkernels.train.errors import SetupError, StorageError, require
from kdkernels.train.models import build, load_weights


def write(path: Path, content: bytes | str) -> None:
    """Write beside ``path``, flush to the disk, then move there: nobody ever sees half a file.

    Raises:
        StorageError: a full disk, a folder that is not writable; what was at ``path`` is intact.
    """
    aside = path.with_name(f".{path.name}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name, too
        os.close(folder)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(
            f"{path} cannot be written: {error.strerror}; what was there before is intact"
        ) from error


class Checkpoints:
    """The last ``keep`` states of a run and the best weights, in one folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def __str__(self) -> str:
        found = self._found()
        return str(found[-1]) if found else "none"

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        path = self.folder / f"step-{step:08d}.pt"
        write(path, _to_bytes(state))
        # Later ones could not be read when the run went on: they are not among those to keep.
        for old in [found for found in self._found() if found <= path][: -self.keep]:
            old.unlink(missing_ok=True)

    def save_best(self, weights: dict[str, Tensor]) -> None:
        write(self.folder / "best.pt", _to_bytes(weights))

    def latest(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest state that can be read; says which one cannot. None if there are none.

        Raises:
            StorageError: there are some, and none of them can be read.
        """
        found = self._found()
        for path in reversed(found):
            try:
                return read(path)
            except StorageError as error:
                say(f"{error}; the one before it is taken")
        if found:
            raise StorageError(f"no checkpoint in {self.folder} can be read")
        return None


def _to_bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read(path: Path) -> dict[str, Any]:
    """What a torch file of tensors, numbers, strings and containers holds."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except Exception as error:  # torch raises a different one for each way a file can be broken
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(f"{path} cannot be read: {what}") from error


def random_states() -> dict[str, Any]:
    """The state of every generator that a step may draw from."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    states["numpy"] = (name, keys.tolist(), *rest)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def save_model(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Write the weights as safetensors, with ``about`` (plain data) in the file's header.

    ``load_model`` needs of it ``name``, ``options``, ``classes``, ``shape``, ``mean``, ``std``.
    """
    # Copies: safetensors takes no two tensors in the same memory, as tied weights are.
    weights = {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    save = require("safetensors.torch", "safetensors", "train").save
    write(path, save(weights, {"kdkernels": json.dumps(about)}))


class Normalize(nn.Module):
    """Images in [0, 1] less their mean and over their standard deviation, by channel."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = (images - self.mean) / self.std
        return out


def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model that a run has left: images in [0, 1] to logits, in eval mode; and what it says.

    Args:
        path: ``model.safetensors``, or the folder of a run, whose first distilled student it is.
    """
    if path.is_dir():
        below = sorted(path.glob("seed*/distilled/model.safetensors"))
        path = next(iter(below), path / "model.safetensors")
    try:
        with require("safetensors", "safetensors", "train").safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["kdkernels"])
    except SetupError:
        raise
    except KeyError as error:
        raise SetupError(f"{path} was not written by kdkernels train") from error
    except Exception as error:  # FileNotFoundError, or safetensors' own
        raise SetupError(f"{path} cannot be read: {error}") from error
    model = build(about["name"], len(about["classes"]), about["shape"][0], about["options"])
    load_weights(model, path)
    return nn.Sequential(Normalize(about["mean"], about["std"]), model).eval(), about
