"""What is asked for in one call, in which form it came, and the backend that is to serve it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import NOT_COMPILED
from kdkernels.backends.native import DTYPE_CODES
from kdkernels.divergences import PerRow
from kdkernels.learnable_temperature import what_has_no_rate
from kdkernels.options import Options
from kdkernels.teachers import TopKTeacher


def form_of(teacher: Any, student: Tensor) -> Any:
    """Several teachers as a tuple of tensors: given as a list, or stacked as (K, ..., C)."""
    if isinstance(teacher, (list, tuple)):
        return tuple(teacher)
    both = isinstance(teacher, Tensor) and isinstance(student, Tensor)
    stacked = both and teacher.dim() == student.dim() + 1
    stacked = stacked and len(teacher) > 0 and teacher.shape[1:-1] == student.shape[:-1]
    return teacher.unbind(0) if stacked else teacher


def one_per_row(tensors: PerRow, student: Tensor) -> PerRow:
    temperature = tensors.get("temperature")
    if temperature is None or temperature.dim() > 0:
        return tensors
    return {**tensors, "temperature": temperature.expand(student.shape[:-1])}


def is_learned(tensors: PerRow) -> bool:
    return "temperature" in tensors and tensors["temperature"].requires_grad


def features_of(
    kind: type, names: Collection[str], options: Options, learned: bool
) -> frozenset[str]:
    """What is asked for in a call beside what the options say, in words.

    Args:
        kind: of the teacher.
        names: of the options that are tensors.
        learned: whether the temperature is one of them and gets a gradient.
    """
    if not names and issubclass(kind, Tensor):
        return frozenset()
    without = what_has_no_rate(options, kind, names) if learned else None
    asked = {
        "a top-k teacher": issubclass(kind, TopKTeacher),
        "several teachers": issubclass(kind, tuple),
        "temperatures per row": "temperature" in names,
        f"{NOT_COMPILED}{without}": without is not None,
        "sample_weight": "sample_weight" in names,
        "logit_bias": "student_bias" in names or "teacher_bias" in names,
    }
    return frozenset(name for name, is_asked in asked.items() if is_asked)


def select(
    device: torch.device,
    student_dtype: torch.dtype,
    teacher_dtypes: Iterable[torch.dtype],
    features: frozenset[str],
    backend: str | None,
) -> backends.Backend:
    """The backend for what is asked for in this call."""
    dtypes = list(teacher_dtypes)
    # Of several, one that no kernel reads decides.
    teacher_dtype = next((d for d in dtypes if d not in DTYPE_CODES), dtypes[0])
    return backends.select(backend, device, student_dtype, teacher_dtype, features)
