"""The ways to compute a distillation loss that are compared, all on the same inputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_results import FORWARD, TRAIN
from benchmarks.results import (
    COMPILED,
    COPY,
    CROSS_ENTROPY,
    EAGER,
    EAGER_LOG_TARGET,
    EMPTY_STEP,
    FUSED,
    INPLACE,
)
from benchmarks.timing import Step
from kdkernels import kd_loss

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
ALPHA = 0.9


def fused(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return kd_loss(student, teacher, labels, temperature=temperature, alpha=ALPHA)


def fused_inplace(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return kd_loss(student, teacher, labels, temperature=temperature, alpha=ALPHA, inplace=True)


def eager(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The textbook: softmax targets into kl_div, beside cross_entropy."""
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
    )
    return ALPHA * temperature**2 * soft + (1 - ALPHA) * F.cross_entropy(student, labels)


def eager_log_target(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """The same with log-softmax targets, which lose nothing where a probability rounds to 0."""
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return ALPHA * temperature**2 * soft + (1 - ALPHA) * F.cross_entropy(student, labels)


@functools.cache
def _compiled() -> Loss:
    return torch.compile(eager, dynamic=False, fullgraph=True)


def compiled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """What torch.compile makes of the textbook, for these very shapes."""
    return _compiled()(student, teacher, labels, temperature)


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """No distillation at all: the yardstick."""
    return F.cross_entropy(student, labels)


class _EmptyStep(torch.autograd.Function):
    """One node that allocates one gradient: what autograd itself costs."""

    @staticmethod
    def forward(ctx: Any, student: Tensor) -> Tensor:  # type: ignore[override]
        ctx.grad = torch.empty_like(student)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:  # type: ignore[override]
        grad: Tensor = ctx.grad
        ctx.grad = None  # autograd copies a gradient that somebody else holds, too
        return grad


def empty_step(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return _EmptyStep.apply(student)


LOSSES: dict[str, Loss] = {
    FUSED: fused,
    INPLACE: fused_inplace,
    EAGER: eager,
    EAGER_LOG_TARGET: eager_log_target,
    COMPILED: compiled,
    CROSS_ENTROPY: cross_entropy,
    EMPTY_STEP: empty_step,
}
# What they are about is the gradient; a forward alone has none.
TRAIN_ONLY = {INPLACE, EMPTY_STEP}


def names(direction: str) -> list[str]:
    """Everything that is compared in this direction, the floor last."""
    return [n for n in (*LOSSES, COPY) if direction == TRAIN or n not in TRAIN_ONLY]


def absent() -> dict[str, str]:
    """Who else has fused this loss, and why it cannot be measured on a CPU."""
    triton = (
        "Triton kernels for a GPU. Triton's interpreter could execute them here, which would say "
        "nothing of their speed; `benchmarks/gpu_report.sh` measures them on a GPU"
    )
    return {"Liger-Kernel": triton, "orda-kernel": triton}


class _FromModel(torch.autograd.Function):
    """Logits as a model would hand them over: no leaf, in memory that may be overwritten."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: list[Tensor]) -> Tensor:  # type: ignore[override]
        return logits[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        return None, None


class Case:
    """One shape, dtype and temperature, ready to run by every provider on the same inputs."""

    def __init__(self, rows: int, classes: int, temperature: float, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (rows, classes)
        self.temperature = temperature
        self.student = (torch.randn(shape, generator=generator) * 3).to(dtype).requires_grad_()
        self.teacher = (torch.randn(shape, generator=generator) * 3).to(dtype)
        self.labels = torch.randint(classes, (rows,), generator=generator)
        self._targets = [torch.zeros_like(self.teacher) for _ in range(3)]

    def at(self, temperature: float) -> Case:
        """The same inputs, not copies of them, at another temperature."""
        other = copy.copy(self)
        other.temperature = temperature
        return other

    def step(self, provider: str, direction: str = TRAIN) -> Step:
        """A forward and a backward with a fresh gradient, or a forward without."""
        if provider == COPY:
            return Step(self._copy if direction == TRAIN else self._copy_two)
        loss = LOSSES[provider]
        if provider == COMPILED:
            torch._dynamo.reset()  # it gives up on a function that it has compiled eight times
        if direction == FORWARD:
            return Step(functools.partial(self._forward, loss))
        if provider == INPLACE:
            return self._overwriting(loss)
        return Step(functools.partial(self._train, loss))

    def steps(self, direction: str = TRAIN) -> dict[str, Step]:
        return {name: self.step(name, direction) for name in names(direction)}

    def drop_gradient(self) -> None:
        self.student.grad = None

    def _train(self, loss: Loss) -> None:
        self.drop_gradient()
        loss(self.student, self.teacher, self.labels, self.temperature).backward()

    @torch.no_grad()
    def _forward(self, loss: Loss) -> None:
        loss(self.student, self.teacher, self.labels, self.temperature)

    def _overwriting(self, loss: Loss) -> Step:
        parameter = torch.zeros((), requires_grad=True)
        logits = [self._targets[0]]

        def run() -> None:
            student = _FromModel.apply(parameter, logits)
            loss(student, self.teacher, self.labels, self.temperature).backward()

        return Step(run, lambda: logits[0].copy_(self.student.detach()))

    def _copy(self) -> None:
        """The floor: student, teacher and gradient copied into memory that is already mapped."""
        sources = (self.student.detach(), self.teacher, self.student.detach())
        for target, source in zip(self._targets, sources, strict=True):
            target.copy_(source)

    def _copy_two(self) -> None:
        """The floor of a forward: student and teacher."""
        for target, source in zip(
            self._targets, (self.student.detach(), self.teacher), strict=False
        ):
            target.copy_(source)
