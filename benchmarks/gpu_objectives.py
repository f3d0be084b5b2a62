"""What has to hold of the objectives on a GPU: each against the reference in float64, and its time.

The kernels of forward KL have checks of their own (gpu_checks.py); these are of all else that
``kd_loss`` offers, each with what it takes beside forward KL and beside its eager form.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_checks import GRAD_BOUND, LOSS_ALLOWANCE, LOSS_BOUND, Checks, loss_error
from benchmarks.gpu_timing import clock_for
from benchmarks.objectives import OBJECTIVES, Logits
from kdkernels import TopKTeacher, kd_loss

ALPHA = 0.7
SHAPES = [
    (9, 10, torch.float32),
    (9, 100, torch.float32),
    (5, 1423, torch.bfloat16),
    (5, 4096, torch.float16),
    (3, 50257, torch.float32),
]
TIMED = (4096, 32000)
DRY_RUN_TIMED = (16, 500)


class Batch(NamedTuple):
    student: Tensor  # (N, C), a leaf
    teacher: Tensor
    labels: Tensor

    def per_row(self, low: float, high: float) -> Tensor:
        return torch.linspace(low, high, len(self.labels), device=self.labels.device)

    def in_double(self) -> Batch:
        student = self.student.detach().double().requires_grad_()
        return Batch(student, self.teacher.double(), self.labels)


def make(rows: int, classes: int, dtype: torch.dtype, device: str) -> Batch:
    generator = torch.Generator(device).manual_seed(1000 * rows + classes)
    student, teacher = (
        (torch.randn(rows, classes, device=device, generator=generator) * 3).to(dtype)
        for _ in range(2)
    )
    labels = torch.randint(classes, (rows,), device=device, generator=generator)
    return Batch(student.requires_grad_(), teacher, labels)


# Beside the objectives of the benchmark: what else goes to the general kernels.
OTHERS: dict[str, Callable[[Batch], dict[str, Any]]] = {
    "a temperature for each row": lambda b: {"temperature": b.per_row(1, 6)},
    "z-loss and smoothing": lambda b: {"z_loss": 1e-3, "label_smoothing": 0.1},
    "sample_weight": lambda b: {"sample_weight": b.per_row(0, 2)},
    "beta for each row": lambda b: {"divergence": "jsd", "beta": b.per_row(0, 1)},
    "two teachers": lambda b: {"teacher_logits": [b.teacher, -b.teacher]},
    "a top-k teacher": lambda b: {"teacher_logits": TopKTeacher.from_logits(b.teacher.double(), 8)},
    "a top-k teacher, bucket": lambda b: {
        "teacher_logits": TopKTeacher.from_logits(b.teacher.double(), 8, "bucket", 2.0),
        "temperature": 2.0,
    },
}


def _options(name: str, batch: Batch) -> dict[str, Any]:
    if name in OTHERS:
        return OTHERS[name](batch)
    return {"temperature": OBJECTIVES[name].temperature} | OBJECTIVES[name].options


def _step(batch: Batch, backend: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    student, options = batch.student, {"teacher_logits": batch.teacher} | options
    student.grad = None
    loss = kd_loss(student, labels=batch.labels, alpha=ALPHA, backend=backend, **options)
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def compare(name: str, batch: Batch, backend: str) -> tuple[bool, str]:
    """Loss and gradient within their bounds of the reference's in float64."""
    loss, grad = _step(batch, backend, _options(name, batch))
    wide = batch.in_double()
    expected, expected_grad = _step(wide, "reference", _options(name, wide))
    off = loss_error(loss, expected)
    difference, norm = (grad.double() - expected_grad).norm().item(), expected_grad.norm().item()
    bound = GRAD_BOUND[grad.dtype] * LOSS_ALLOWANCE.get(backend, 1.0)
    passed = off <= LOSS_BOUND * LOSS_ALLOWANCE.get(backend, 1.0) and difference <= bound * norm
    return passed, f"loss off {off:.1e}, gradient off {difference / (norm or 1):.1e} of its norm"


def timed(name: str, batch: Batch, backend: str, device: str) -> tuple[bool, str]:
    """Milliseconds of a step, and what they are of forward KL's and of the eager form's."""
    clock, options = clock_for(device), _options(name, batch)

    def eager(_: int) -> None:
        objective = OBJECTIVES[name]
        batch.student.grad = None
        s, t = objective.of_logits(batch.student), objective.of_logits(batch.teacher)
        soft = objective.eager(Logits(s, t, batch.labels, objective.temperature))
        hard = torch.nn.functional.cross_entropy(s, batch.labels)
        (ALPHA * soft * objective.temperature**2 + (1 - ALPHA) * hard).backward()

    steps: dict[str, Callable[[int], Any]] = {
        "ours": lambda _: _step(batch, backend, options),
        "forward KL": lambda _: _step(batch, backend, {"temperature": 2.0}),
    }
    if name in OBJECTIVES:
        steps["eager"] = eager
    for step in steps.values():  # compiles
        step(0)
    clock.finish()
    turns = [{key: clock.ms(step, 3) for key, step in steps.items()} for _ in range(5)]
    middle = {key: sorted(turn[key] for turn in turns)[2] for key in steps}
    beside = f"{middle['ours'] / middle['forward KL']:.2f} x forward KL"
    if "eager" in middle:
        beside += f", eager / ours {middle['eager'] / middle['ours']:.1f}"
    return True, f"{middle['ours']:.3g} ms, {beside}"


def objectives(work: Path, device: str, backends: list[str], seconds: float) -> bool:
    """Every objective on all backends; one that had no time left has failed."""
    checks = Checks(work, "objectives")
    end = time.perf_counter() + seconds
    timed_shape = DRY_RUN_TIMED if device == "cpu" else TIMED
    shapes = SHAPES[:3] if device == "cpu" else SHAPES
    large = make(*timed_shape, torch.float32, device)
    for backend in backends:
        for name in (*OBJECTIVES, *OTHERS):
            if time.perf_counter() > end:
                checks.record(f"{backend}: {name}", False, "no time was left for it")
                continue
            for rows, classes, dtype in shapes:
                what = f"{backend}: {name}, ({rows}, {classes}) {str(dtype)[6:]}"
                batch = make(rows, classes, dtype, device)
                checks.attempt(what, lambda n=name, b=batch, k=backend: compare(n, b, k))
            what = f"{backend}: {name}, {timed_shape} float32"
            checks.attempt(what, lambda n=name, k=backend: timed(n, large, k, device))
    return checks.all_passed()
