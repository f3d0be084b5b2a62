"""Files written whole or not at all, and the checkpoint of a student."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdkernels.train.models import MODELS


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write beside ``path``, then move it there: nobody ever sees half a file."""
    aside = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        save(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save(path: Path, model: nn.Module, architecture: dict[str, Any], about: dict[str, Any]) -> None:
    """Save what :func:`load` needs, and ``about``: how the model was made and what it reached.

    Args:
        architecture: ``name``, a key of ``MODELS``, and its keyword arguments.
        about: plain numbers, strings, lists and dicts only, so that ``weights_only=True`` loads it.
    """
    content = {"model": model.state_dict(), "architecture": architecture, "about": about}
    write(path, lambda aside: torch.save(content, aside))


def load(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint, in eval mode, and what is said about it."""
    content = torch.load(path, weights_only=True)
    options = dict(content["architecture"])
    model = MODELS[options.pop("name")](**options)
    model.load_state_dict(content["model"])
    return model.eval(), content["about"]
