"""The ways to compute the loss that the GPU report compares: one step each, on the same inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import providers
from benchmarks.gpu_results import COMPILED, COPY, CROSS_ENTROPY, EAGER, ours
from benchmarks.providers import ALPHA, Loss
from kdkernels import kd_loss

TEMPERATURE = 4.0


class Inputs:
    """Student, teacher and labels of one shape, and what some providers need of their own."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype, device: str) -> None:
        shape = (rows, classes)
        self.student = (torch.randn(shape, device=device, dtype=dtype) * 3).requires_grad_()
        self.teacher = torch.randn(shape, device=device, dtype=dtype) * 3
        self.labels = torch.randint(classes, (rows,), device=device)

    @functools.cached_property
    def overwritten(self) -> Tensor:
        """Student logits for providers that write their gradient over them."""
        return self.student.detach().clone().requires_grad_()

    @functools.cached_property
    def source(self) -> Tensor:
        """As large as half the traffic of a forward + backward: a copy reads and writes it."""
        elements = self.student.numel() * 3 // 2
        return torch.ones(elements, device=self.student.device, dtype=self.student.dtype)

    @functools.cached_property
    def target(self) -> Tensor:
        return torch.empty_like(self.source)

    def drop_gradients(self) -> None:
        self.student.grad = None
        if "overwritten" in self.__dict__:
            self.overwritten.grad = None


Step = Callable[[Inputs], Tensor | None]


class Provider(NamedTuple):
    name: str
    train: Step  # forward + backward, fresh gradient; returns it, where it computes one
    forward: Step | None


def of_loss(name: str, loss: Loss, compiled: Loss | None = None) -> Provider:
    run = compiled or loss

    def train(inputs: Inputs) -> Tensor | None:
        inputs.student.grad = None
        run(inputs.student, inputs.teacher, inputs.labels, TEMPERATURE).backward()
        return inputs.student.grad

    def forward(inputs: Inputs) -> None:
        with torch.no_grad():
            run(inputs.student, inputs.teacher, inputs.labels, TEMPERATURE)

    return Provider(name, train, forward)


def kdkernels(backend: str) -> Provider:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        return kd_loss(
            student, teacher, labels, temperature=temperature, alpha=ALPHA, backend=backend
        )

    return of_loss(ours(backend), loss)


def compiled(compiler: str) -> Provider:
    """A fresh compilation of the eager loss: one that grew dynamic would be another baseline."""
    torch._dynamo.reset()
    loss = torch.compile(providers.eager, backend=compiler, dynamic=False, fullgraph=True)
    return of_loss(COMPILED, loss)


def copy() -> Provider:
    """The bytes of three arrays, or of two, moved in one launch: half are read, half written."""

    def train(inputs: Inputs) -> None:
        inputs.target.copy_(inputs.source)

    def forward(inputs: Inputs) -> None:
        elements = inputs.student.numel()
        inputs.target[:elements].copy_(inputs.source[:elements])

    return Provider(COPY, train, forward)


def liger() -> Provider:
    """Liger-Kernel's KL divergence beside its cross entropy, which overwrites the logits.

    Raises:
        ImportError: it is not there.
    """
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    kl, cross_entropy = LigerKLDIVLoss(reduction="batchmean"), LigerCrossEntropyLoss()

    def loss(inputs: Inputs) -> Tensor:
        student = inputs.overwritten
        # Before the cross entropy, which leaves no logits behind.
        log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
        soft = kl(log_q, F.softmax(inputs.teacher / TEMPERATURE, dim=-1))
        hard = cross_entropy(student, inputs.labels)
        return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard

    def train(inputs: Inputs) -> Tensor | None:
        inputs.overwritten.grad = None
        loss(inputs).backward()
        return inputs.overwritten.grad

    def forward(inputs: Inputs) -> None:
        with torch.no_grad():
            loss(inputs)

    return Provider("Liger-Kernel", train, forward)


def orda() -> Provider:
    """orda-kernel's CE + KL kernel, which overwrites the logits with their gradient.

    Its public functions start from hidden states; this is what they launch for teacher logits that
    were computed before, at the block size they would choose.

    Raises:
        ImportError: it is not there.
    """
    from orda_kernel.ops._kernels.precomputed.tokenwise import _precomputed_student_fwdbwd

    def train(inputs: Inputs) -> Tensor:
        student = inputs.overwritten.detach()
        rows = student.shape[0]
        hard, soft = torch.empty(2, rows, device=student.device, dtype=torch.float32)
        _precomputed_student_fwdbwd(
            student,
            inputs.teacher,
            inputs.labels,
            hard,
            soft,
            kl_weight=ALPHA / rows,
            kl_temperature=TEMPERATURE,
            student_scale=(1 - ALPHA) / rows,
            assume_valid=True,
        )
        (ALPHA * soft + (1 - ALPHA) * hard).mean()
        return student

    return Provider("orda-kernel", train, None)


# Compared where they are installed.
OTHERS: dict[str, Callable[[], Provider]] = {"Liger-Kernel": liger, "orda-kernel": orda}


def available(backends: list[str], compiler: str) -> tuple[list[Provider], dict[str, str]]:
    """Every provider that can be imported, ours first, and why others can not."""
    found = [
        copy(),
        *map(kdkernels, backends),
        of_loss(EAGER, providers.eager),
        compiled(compiler),
        of_loss(CROSS_ENTROPY, providers.cross_entropy),
    ]
    missing = {}
    for name, make in OTHERS.items():
        try:
            found.append(make())
        except Exception as error:  # whatever somebody else's import may raise
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
