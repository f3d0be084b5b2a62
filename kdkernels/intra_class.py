"""The part of DIST that lies across the batch: Huang et al. 2022, arXiv:2205.10536.

Every class is compared over the rows, so that no row has a loss of its own, and no kernel that goes
row by row can have it. PyTorch makes it, beside the compiled part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.divergences import PerRow
from kdkernels.options import Options
from kdkernels.reference import accumulation_dtype, probabilities
from kdkernels.teachers import Teacher


class _OneMinusCorrelation(torch.autograd.Function):
    """The mean over the columns of 1 - Pearson's correlation of p and q in the rows that count,
    in all others of which both are finite.

    The gradient is made in the forward: with unit vectors a, b of the centred columns it is
    (b - a - d b) / |q| where d = 1 - a·b, a fifth of what autograd would go through.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor, active: Tensor) -> Tensor:  # type: ignore[override]
        columns = _compare(q, p, active)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(q, p, active)
            ctx.grad = columns.gradient()
        nothing = columns.distance.new_zeros(())
        return torch.where(active.any(), columns.distance.mean(), nothing)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        again = torch.is_grad_enabled()  # for a second derivative
        grad = _compare(*ctx.saved_tensors).gradient() if again else ctx.grad
        return grad * incoming, None, None


class _Columns(NamedTuple):
    student: Tensor  # unit vectors b, (N, C)
    difference: Tensor  # b - a
    distance: Tensor  # 1 - a·b, (C,)
    scale: Tensor  # of the gradient: 1 / (C |q|), (C,)

    def gradient(self) -> Tensor:
        return torch.addcmul(self.difference, self.student, self.distance, value=-1) * self.scale


def _compare(q: Tensor, p: Tensor, active: Tensor) -> _Columns:
    (b, of_q), (a, of_p) = _unit_columns(q, active), _unit_columns(p, active)
    both = (of_p > 0) & (of_q > 0)  # a constant column is correlated with nothing
    difference = b - a
    # Half the squared distance of unit vectors does not cancel.
    distance = torch.where(both, difference.square().sum(0) / 2, 1.0)
    return _Columns(b, difference, distance, torch.where(both, of_q / q.shape[1], 0.0))


def _unit_columns(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Columns, centred in the rows that count, of norm 1, and what they were multiplied with."""
    counts = active.to(x.dtype)
    centred = (x - counts.T @ x / counts.sum().clamp(min=1)) * counts
    norm = centred.square().sum(0).sqrt()
    constant = norm <= 1e-12
    scale = torch.where(constant, 0.0, 1 / torch.where(constant, 1.0, norm))
    return centred * scale, scale


def with_intra_class(
    result: Any,
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    options: Options,
    tensors: PerRow,
) -> Any:
    """``result``, a loss or named terms, with alpha · T² · dist_gamma · the mean over the classes
    of 1 - Pearson's correlation of their columns added."""
    p, q, active = probabilities(student, teacher, labels, options, tensors)
    columns = _OneMinusCorrelation.apply(q, p, active)
    factor = options.temperature**2 if options.scale_by_t2 else 1.0
    count = active.sum() if options.reduction == "sum" else 1
    weight = next(term.weight for term in options.divergence if term.name == "dist")
    soft = columns * (options.intra_class * factor * weight) * count
    soft = soft.to(accumulation_dtype(student.dtype))
    if isinstance(result, Tensor):
        return result + options.alpha * soft
    added = {"loss": result.loss + options.alpha * soft, "soft": result.soft + soft.detach()}
    return result._replace(**added)
