"""Handing tensors to native code: pointers, strides, codes, and why a module is missing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

# KdDtype and KdReduction of csrc/problem.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
REDUCTION_CODES = {"mean": 0, "sum": 1, "none": 2}


def address(name: str, tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ValueError(
            f"{name} holds no memory that a kernel could read: a freed storage, or a fake or "
            "functional tensor"
        )
    return address


def laid_out(logits: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The logits, or a copy if their rows cannot be walked, and (inner, outer, step) of the rows.

    Row i starts ``(i // inner) * outer + (i % inner) * step`` elements in: two levels, so that
    ``logits[:, :-1]`` of a (B, L, C) tensor needs no copy.
    """
    if logits.is_neg():  # a lazy minus sign that a pointer does not show
        logits = logits.detach().resolve_neg()
    if logits.is_contiguous():
        return logits, (1, logits.shape[-1], 0)
    shape, strides = logits.shape, logits.stride()
    groups: list[tuple[int, int]] = []  # (size, stride) of runs of leading dimensions, inner first
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if groups and groups[-1][0] * groups[-1][1] == stride:
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        elif size > 1:
            groups.append((size, stride))
    if len(groups) > 2 or (strides[-1] != 1 and shape[-1] > 1):
        return logits.detach().contiguous(), (1, shape[-1], 0)
    if len(groups) == 2:
        return logits, (groups[0][0], groups[1][1], groups[0][1])
    return logits, (1, groups[0][1] if groups else 0, 0)


def why_not_built(module: str, import_error: str) -> str:
    """Why the compiled module of this name ("cpu", "cuda") is not there to be used."""
    record = Path(__file__).resolve().parent.parent / "_build.json"
    if record.exists():
        reason = json.loads(record.read_text(encoding="utf-8")).get(module)
        if reason:
            return f"not built at installation: {reason}"
    elif (record.parent.parent / "setup.py").exists():
        return (
            f"kdkernels was imported from its source tree {record.parent.parent}, where it was not "
            "built; run `pip install -e .` there, or start Python in another directory"
        )
    return f"its compiled module does not import: {import_error}"
