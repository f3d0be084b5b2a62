"""What the user is told in one line instead of a traceback, and the exit code that says which."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class TrainError(Exception):
    """Training failed."""

    exit_code = 1


class SetupError(TrainError):
    """Nothing was trained: an option, a file that was given or a missing package is in the way."""

    exit_code = 2


class StorageError(TrainError):
    """A file of the run cannot be written, or not be read again; what was there is intact."""

    exit_code = 3


class NonFiniteError(TrainError):
    """A loss is NaN or infinite."""

    exit_code = 4


class Interrupted(TrainError):
    """SIGINT or SIGTERM came; a checkpoint of the last step was written."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # what a shell reports


def require(module: str, package: str, extra: str) -> Any:
    """Import an optional dependency, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SetupError(
            f"{package} is not installed ({error}): pip install 'kdkernels[{extra}]'"
        ) from error


def nearest(wrong: str, names: Iterable[str]) -> str:
    """``"; did you mean ...?"``, or nothing where no name is near."""
    found = difflib.get_close_matches(wrong, list(names), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""
