"""The shift between logits and labels of a causal language model, made of the labels alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.checks import LABEL_DTYPES


def check_shift(shift: Any) -> None:
    """Raise TypeError or ValueError if it is not a number of positions."""
    if isinstance(shift, (bool, Tensor)) or not hasattr(shift, "__index__"):
        raise TypeError(f"shift must be an int, got {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")


def shifted(
    labels: Any, sample_weight: Any, shift: Any, ignore_index: int, distill_ignored: bool
) -> tuple[Any, Any]:
    """``labels`` (..., L) moved to where the logits are that predict them, and the row weights.

    Slices of the logits, ``logits[:, :-1]``, would have a gradient that is copied into one of the
    whole size; of the labels' copy only the last ``shift`` are new, and ignored.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """
    check_shift(shift)
    if labels is None:
        raise ValueError("shift needs labels: without them no row is left out")
    if not isinstance(labels, Tensor) or labels.dtype not in LABEL_DTYPES:  # an error by and by
        return labels, sample_weight
    if not labels.dim():
        raise ValueError("shift needs labels of shape (..., L), got a single label")
    labels, n = labels.long(), min(shift, labels.shape[-1])
    tail = labels.new_full((*labels.shape[:-1], n), ignore_index)
    labels = torch.cat((labels[..., n:], tail), -1)
    if distill_ignored:  # but not what predicts nothing
        if sample_weight is None:
            sample_weight = torch.ones(labels.shape, device=labels.device)
        if isinstance(sample_weight, Tensor) and sample_weight.shape == labels.shape:
            nothing = torch.zeros_like(sample_weight[..., :n])
            sample_weight = torch.cat((sample_weight[..., : labels.shape[-1] - n], nothing), -1)
    return labels, sample_weight
