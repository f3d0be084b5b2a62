"""The reference as a backend: any device and dtype, and the fallback where nothing is compiled."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels.backends.base import Result, scale_gradient
from kdkernels.reference import accumulation_dtype, kd_terms

if TYPE_CHECKING:
    from kdkernels.divergences import PerRow
    from kdkernels.options import Options
    from kdkernels.teachers import Teacher


class ReferenceBackend:
    name = "reference"
    device_types: tuple[str, ...] = ()
    features: frozenset[str] | None = None
    specialised: frozenset[str] | None = None

    def unavailable(self) -> str | None:
        return None

    def details(self) -> str:
        return f"pure PyTorch {torch.__version__}, any device and dtype"

    def why_not(
        self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype
    ) -> str | None:
        return None

    scale = staticmethod(scale_gradient)

    def run(
        self,
        student: Tensor,
        teacher: Teacher,
        labels: Tensor | None,
        weight: Tensor | None,
        options: Options,
        want_terms: bool,
        want_grad: bool,
        inplace: bool,
        tensors: PerRow,
    ) -> Result:
        """Differentiable as it stands; ``want_grad`` is asked for with ``inplace`` only."""
        check = student.device.type == "cpu" or os.environ.get("KDKERNELS_CHECK_LABELS") == "1"
        if labels is not None and check:
            classes = options.num_classes or student.shape[-1]
            check_labels(labels, classes, options.ignore_index)
        if not want_grad:
            terms = kd_terms(student, teacher, labels, options, weight, tensors)
            return Result(terms.loss, terms.soft, terms.hard, None, 1.0, terms[3:])
        with torch.enable_grad():
            leaf = student.detach().to(accumulation_dtype(student.dtype), copy=True)
            leaf.requires_grad_()
            terms = kd_terms(leaf, teacher, labels, options, weight, tensors)
            (grad,) = torch.autograd.grad(terms.loss.sum(), leaf)
        grad_scale: float | Tensor = 1.0
        if student.dtype == torch.float16 and grad.numel():
            # The largest entry is brought to 2^14, so that the smallest survive in float16.
            largest = grad.abs().amax()
            grad_scale = torch.where(largest > 0, (2.0**14 / largest).log2().floor().exp2(), 1.0)
            grad *= grad_scale
        target = student.detach()
        target.copy_(grad)
        loss = terms.loss.detach().to(accumulation_dtype(student.dtype))
        return Result(loss, terms.soft, terms.hard, target, grad_scale, terms[3:])


def check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError naming the first label out of range. The host waits for the device."""
    labels = labels.long()  # in eight bits, classes and ignore_index would wrap around
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if bad.any():
        row = int(bad.reshape(-1).nonzero()[0])
        raise IndexError(
            f"labels[{row}] is {int(labels.reshape(-1)[row])}: expected 0 <= label < {classes} "
            f"or ignore_index {ignore_index}"
        )
