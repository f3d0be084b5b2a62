"""What a mean divides by where that is not the rows of the call alone: ``num_items``, ``group``.

Trainers that accumulate gradients, or train on several devices, hold unequal numbers of active rows
in each call. A mean of such means weighs rows unequally; a sum over a common count does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdkernels.divergences import PerRow
from kdkernels.options import Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def with_items(
    tensors: PerRow,
    num_items: Any,
    group: ProcessGroup | None,
    student: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    options: Options,
) -> PerRow:
    """``tensors`` with what the means of the soft and of the hard term divide by, (2,), float64.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """
    asked = "num_items" if group is None else "group"
    if options.reduction != "mean":
        raise ValueError(f"{asked} is of a mean, and reduction is {options.reduction!r}")
    if options.intra_class > 0:  # which is no mean over rows
        raise ValueError(f"dist_gamma and {asked} do not go together")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group or None, got {type(group).__name__}")
    if group is None:
        return {**tensors, "num_items": _given(num_items, student)}
    if num_items is not None:
        raise ValueError("num_items and group do not go together: either says what a mean is of")
    sums = torch.stack(_sums(student, labels, weight, options, tensors))
    dist.all_reduce(sums, group=group)
    # As many times the part of the global mean as there are processes: DDP and FSDP divide by that.
    return {**tensors, "num_items": sums / dist.get_world_size(group)}


def _given(num_items: Any, student: Tensor) -> Tensor:
    both = num_items if isinstance(num_items, (tuple, list)) else (num_items, num_items)
    if len(both) != 2:
        raise ValueError(f"num_items must be one number or (soft, hard), got {len(both)} values")
    return torch.stack([_number(each, student) for each in both])


def _number(value: Any, student: Tensor) -> Tensor:
    """On the device of the logits; one that is there already is not looked at."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"num_items must be one number, got shape {tuple(value.shape)}")
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            _check(value.item())
        one = value.detach().reshape(())
        return one.to(student.device, torch.float64, non_blocking=True)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"num_items must be a number or a Tensor, got {type(value).__name__}")
    _check(value)
    return torch.full((), value, dtype=torch.float64, device=student.device)


def _check(value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"num_items must be finite and >= 0, got {value}")


def _sums(
    student: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    options: Options,
    tensors: PerRow,
) -> tuple[Tensor, Tensor]:
    """What the means of this call alone would divide by, float64."""
    rows = tensors.get("sample_weight")
    if rows is None:
        rows = torch.ones((), device=student.device).expand(student.shape[:-1])
    rows = rows.detach().to(torch.float64)
    if labels is None:
        return rows.sum(), rows.new_zeros(())
    labels = labels.long()
    hard = torch.where(labels != options.ignore_index, rows, 0.0)
    soft = rows if options.distill_ignored else hard
    if weight is not None:
        # The row of a label out of range is NaN, or has raised: any class will do.
        known = (labels >= 0) & (labels < len(weight))
        hard = hard * weight.detach().to(torch.float64)[torch.where(known, labels, 0)]
    return soft.sum(), hard.sum()
