"""The definition of truth: every loss of this package in plain, twice differentiable PyTorch.

The compiled backends are tested against this file in float64. It favours being read over being
fast, and materialises everything that the fused kernels never do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.divergences import DIVERGENCES, FORWARD_KL, PerRow, Term, mixture_rows


class KDTerms(NamedTuple):
    """What ``kd_loss(..., return_terms=True)`` returns; ``soft`` and ``hard`` are detached.

    Attributes:
        loss: ``alpha * soft + (1 - alpha) * hard``, reduced as asked.
        soft: the divergence between teacher and student, times T², reduced as asked.
        hard: cross entropy with the labels, reduced as asked; zero without labels.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the loss for logits of ``dtype``: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mean(rows: Tensor, denominator: Tensor) -> Tensor:
    # Nothing active is 0, not 0/0, and still connected to the graph (DDP needs a gradient).
    return rows.sum() / torch.where(denominator == 0, 1.0, denominator)


def kd_terms(
    student_logits: Tensor,  # [..., C]
    teacher_logits: Tensor,  # [..., C]
    labels: Tensor | None,  # [...]
    *,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
    weight: Tensor | None,  # [C]
    reduction: str,
    distill_ignored: bool,
    divergence: tuple[Term, ...] = FORWARD_KL,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    per_row: PerRow | None = None,
) -> KDTerms:
    """The loss as :func:`kdkernels.kd_loss` documents it; divergences.py has its soft term."""
    classes = student_logits.shape[-1]
    leading = student_logits.shape[:-1]
    dtype = torch.promote_types(
        accumulation_dtype(student_logits.dtype), accumulation_dtype(teacher_logits.dtype)
    )
    student = student_logits.reshape(-1, classes).to(dtype)
    teacher = teacher_logits.detach().reshape(-1, classes).to(dtype)
    ones = torch.ones(student.shape[0], dtype=dtype, device=student.device)
    if labels is None:
        hard_active = torch.zeros_like(ones, dtype=torch.bool)
        soft_active = ~hard_active
        out_of_range = hard_active
        target = torch.zeros_like(ones, dtype=torch.long)
    else:
        target = labels.reshape(-1).long()
        hard_active = target != ignore_index
        soft_active = torch.ones_like(hard_active) if distill_ignored else hard_active
        # Labels out of range are never used as an index: on a GPU that would end the process.
        in_range = (target >= 0) & (target < classes)
        out_of_range = hard_active & ~in_range
        target = torch.where(hard_active & in_range, target, 0)

    # Ignored rows are replaced before any arithmetic: 0 * NaN would reach the gradient.
    keep = soft_active[:, None]
    student = torch.where(keep, student, 0.0)
    teacher = torch.where(keep, teacher, 0.0)

    log_p = F.log_softmax(teacher / (teacher_temperature or temperature), dim=-1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    soft = mixture_rows(log_p, log_q, target, divergence, per_row or {})
    if DIVERGENCES[divergence[0].name].labelled:
        soft = soft * torch.where(out_of_range, torch.nan, 1.0)
    soft = torch.where(soft_active, soft, 0.0) * (temperature**2 if scale_by_t2 else 1.0)
    weight = None if weight is None else weight.to(dtype)
    ce_rows = F.cross_entropy(
        student, target, weight=weight, label_smoothing=label_smoothing, reduction="none"
    )
    ce_rows = ce_rows * torch.where(out_of_range, torch.nan, 1.0)  # the gradient's row as well
    hard = torch.where(hard_active, ce_rows, 0.0)
    if reduction == "none":
        soft, hard = soft.reshape(leading), hard.reshape(leading)
    elif reduction == "sum":
        soft, hard = soft.sum(), hard.sum()
    else:
        row_weight = ones if weight is None else weight[target]
        soft = _mean(soft, soft_active.to(dtype).sum())
        hard = _mean(hard, torch.where(hard_active, row_weight, 0.0).sum())
    # A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
    parts = [w * term for w, term in ((alpha, soft), (1 - alpha, hard)) if w != 0]
    loss_dtype = accumulation_dtype(student_logits.dtype)
    return KDTerms(
        sum(parts[1:], parts[0]).to(loss_dtype),
        soft.detach().to(loss_dtype),
        hard.detach().to(loss_dtype),
    )
