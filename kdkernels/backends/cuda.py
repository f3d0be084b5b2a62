"""The CUDA C++ backend: hands pointers, strides and the current stream to ``csrc/cuda``."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels.backends.base import Result, items_of
from kdkernels.backends.native import (
    DTYPE_CODES,
    REDUCTION_CODES,
    address,
    laid_out,
    why_not_built,
)
from kdkernels.backends.plan import plan_of
from kdkernels.backends.reference import check_labels
from kdkernels.reference import accumulation_dtype

if TYPE_CHECKING:
    from kdkernels.divergences import PerRow
    from kdkernels.options import Options
    from kdkernels.teachers import Teacher

_cuda: Any
try:
    from kdkernels import _cuda  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _cuda = None
    _import_error = str(error)


@functools.lru_cache(maxsize=256)
def _is_special(options: Options) -> bool:
    """Whether the options alone ask for more than the kernels of the forward KL have."""
    return bool(options.features)


def _one_look(student: Tensor, teacher: Tensor, options: Options, tensors: PerRow) -> bool:
    """Whether the kernels of the forward KL serve it."""
    mixed = student.dtype != teacher.dtype and torch.float64 in (student.dtype, teacher.dtype)
    return not tensors and not mixed and not _is_special(options)


class CUDABackend:
    name = "cuda"
    device_types: tuple[str, ...] = ("cuda",)
    features: frozenset[str] | None = None
    specialised: frozenset[str] | None = frozenset()
    module: Any = _cuda

    def unavailable(self) -> str | None:
        return self.why_not_on(None)

    def why_not_on(self, index: int | None) -> str | None:
        """Of one GPU: to ask another would take its memory. None is the current one."""
        if torch.version.hip is not None:
            return "it is CUDA C++; on AMD GPUs the triton backend serves"
        if self.module is None:
            return why_not_built("cuda", _import_error)
        if not torch.cuda.is_available():
            return "no CUDA GPU is visible to torch"
        index = torch.cuda.current_device() if index is None else index
        reason: str = self.module.why_not(index)
        if reason:
            major, minor = torch.cuda.get_device_capability(index)
            built = self.module.architectures
            return f"built for {built}, and this GPU is sm_{major}{minor}: {reason}"
        return None

    def details(self) -> str:
        return (
            f"compiled CUDA C++ for {self.module.architectures}, on {torch.cuda.get_device_name()}"
        )

    def why_not(
        self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype
    ) -> str | None:
        if device.type != "cuda":
            return f"it serves CUDA tensors, and these are on {device.type}"
        return self.why_not_on(device.index) or self.why_no_kernel(student_dtype, teacher_dtype)

    def why_no_kernel(self, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> str | None:
        """Why there is no kernel for these dtypes; None if there is."""
        for dtype in (student_dtype, teacher_dtype):
            if dtype not in DTYPE_CODES:
                return f"it has no kernel for {dtype}"
        return None

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
        temperature, alpha, ignore_index, label_smoothing, reduction, distill_ignored, *_ = options
        num_items, tensors = items_of(tensors)
        classes = options.num_classes or student.shape[-1]
        rows = student.shape[:-1].numel()
        source, student_rows = laid_out(student)
        plan, of_teacher, teacher_rows = None, source, student_rows
        if isinstance(teacher, Tensor) and _one_look(student, teacher, options, tensors):
            of_teacher, teacher_rows = laid_out(teacher)
        else:
            plan = plan_of(self.module, student, teacher, options, tensors)
        if labels is not None:
            if os.environ.get("KDKERNELS_CHECK_LABELS") == "1":
                check_labels(labels, classes, ignore_index)
            if labels.dtype not in (torch.int64, torch.int32):
                labels = labels.long()
            labels = labels.resolve_neg().contiguous()
        if weight is not None:
            weight = weight.to(torch.float64).resolve_neg().contiguous()
        grad, grad_rows = None, student_rows
        if want_grad and inplace:
            grad = source.detach()
        elif want_grad:
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
            grad_rows = (1, student.shape[-1], 0)
        if grad is not None and classes < student.shape[-1]:
            grad[..., classes:] = 0  # which are no part of the loss
        shape = student.shape[:-1] if reduction == "none" else ()
        loss = student.new_empty(shape, dtype=accumulation_dtype(student.dtype))
        soft = torch.empty_like(loss) if want_terms else None
        hard = torch.empty_like(loss) if want_terms else None
        grad_scale = None
        if grad is not None and student.dtype == torch.float16:
            grad_scale = student.new_empty((), dtype=torch.float64)
        device, stream = self.device_and_stream(student)
        size = self.module.workspace_bytes
        if plan is not None:
            size = self.module.general_bytes(rows, classes, device)
        workspace = student.new_empty(size, dtype=torch.uint8)
        self.module.run(
            None if plan is None else plan.native,
            options.z_loss,
            address("student_logits", source),
            address("teacher_logits", of_teacher),
            0 if labels is None else address("labels", labels),
            0 if weight is None else address("weight", weight),
            0 if grad is None else grad.data_ptr(),
            loss.data_ptr(),
            0 if soft is None else soft.data_ptr(),
            0 if hard is None else hard.data_ptr(),
            0 if num_items is None else num_items.data_ptr(),
            0 if grad_scale is None else grad_scale.data_ptr(),
            workspace.data_ptr(),
            student_rows,
            teacher_rows,
            grad_rows,
            rows,
            classes,
            DTYPE_CODES[student.dtype],
            DTYPE_CODES[of_teacher.dtype],
            labels is not None and labels.dtype == torch.int64,
            temperature,
            alpha,
            ignore_index,
            label_smoothing,
            REDUCTION_CODES[reduction],
            distill_ignored,
            device,
            stream,
        )
        if grad is not None and inplace and source is not student:
            grad = student.detach().copy_(grad)
        metrics = () if plan is None else plan.reduced(student, labels, options, tensors)
        return Result(loss, soft, hard, grad, 1.0 if grad_scale is None else grad_scale, metrics)

    def device_and_stream(self, tensor: Tensor) -> tuple[int, int]:
        """Asked for at every call: a graph that is captured has a stream of its own."""
        device = tensor.get_device()
        stream: int = torch._C._cuda_getCurrentRawStream(device)
        return device, stream

    def scale(self, grad: Tensor, incoming: Tensor, grad_scale: float | Tensor) -> Tensor:
        """``grad`` times ``incoming / grad_scale``, both of which only the device looks at."""
        if incoming.dtype not in DTYPE_CODES:
            incoming = incoming.to(torch.float64)
        incoming = incoming.resolve_neg()
        target, grad_rows = laid_out(grad)
        classes = grad.shape[-1]
        rows, stride = grad.numel() // classes, 0
        if incoming.dim() > 0:
            incoming = incoming.expand(grad.shape[:-1]).reshape(-1)
            stride = incoming.stride(0)
        elif grad.is_contiguous():
            rows, classes, grad_rows = 1, grad.numel(), (1, 0, 0)
        device, stream = self.device_and_stream(grad)
        self.module.scale(
            target.data_ptr(),
            DTYPE_CODES[grad.dtype],
            grad_rows,
            rows,
            classes,
            incoming.data_ptr(),
            DTYPE_CODES[incoming.dtype],
            stride,
            grad_scale.data_ptr() if isinstance(grad_scale, Tensor) else 0,
            device,
            stream,
        )
        return grad if target is grad else grad.copy_(target)
