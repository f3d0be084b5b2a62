"""The ways to compute a distillation loss that are compared, all on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import kd_loss

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
ALPHA = 0.9


def fused(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return kd_loss(student, teacher, labels, temperature=temperature, alpha=ALPHA)


def eager(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The textbook: softmax targets into kl_div, beside cross_entropy."""
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
    )
    return ALPHA * temperature**2 * soft + (1 - ALPHA) * F.cross_entropy(student, labels)


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """No distillation at all: the yardstick."""
    return F.cross_entropy(student, labels)


class _EmptyStep(torch.autograd.Function):
    """One node that allocates one gradient: what autograd itself costs."""

    @staticmethod
    def forward(ctx: Any, student: Tensor) -> Tensor:  # type: ignore[override]
        ctx.grad = torch.empty_like(student)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return ctx.grad


def empty_step(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return _EmptyStep.apply(student)


PROVIDERS: dict[str, Loss] = {
    "fused": fused,
    "eager": eager,
    "cross_entropy": cross_entropy,
    "empty_step": empty_step,
}


class Case:
    """One shape, ready to run: ``step(provider)`` is a forward and a backward, fresh gradient."""

    def __init__(self, rows: int, classes: int, temperature: float, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (rows, classes)
        self.temperature = temperature
        self.student = (torch.randn(shape, generator=generator) * 3).to(dtype).requires_grad_()
        self.teacher = (torch.randn(shape, generator=generator) * 3).to(dtype)
        self.labels = torch.randint(classes, (rows,), generator=generator)
        self._copies = [torch.empty(shape, dtype=dtype) for _ in range(3)]

    def step(self, provider: str) -> Callable[[], None]:
        loss = PROVIDERS[provider]

        def run() -> None:
            self.student.grad = None
            loss(self.student, self.teacher, self.labels, self.temperature).backward()

        return run

    def copy_three_arrays(self) -> None:
        """The floor: student, teacher and gradient copied into memory that is already mapped."""
        sources = (self.student.detach(), self.teacher, self.student.detach())
        for target, source in zip(self._copies, sources, strict=True):
            target.copy_(source)
