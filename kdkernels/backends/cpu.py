"""The compiled CPU backend: hands pointers and strides to ``csrc/cpu``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels.backends.base import Result, scale_gradient
from kdkernels.reference import accumulation_dtype

if TYPE_CHECKING:
    from kdkernels.checks import Options

try:
    # After torch, whose libgomp the kernel then finds and shares.
    from kdkernels import _cpu
except ImportError as error:
    _cpu = None  # type: ignore[assignment]
    _import_error = str(error)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
REDUCTION_CODES = {"mean": 0, "sum": 1, "none": 2}


class CPUBackend:
    name = "cpu"
    device_type: str | None = "cpu"

    def unavailable(self) -> str | None:
        return None if _cpu is not None else _why_not_built()

    def details(self) -> str:
        library = _cpu.openmp_library()
        threads = (
            f"{torch.get_num_threads()} threads of {Path(library).name}"
            if library
            else "1 thread: no OpenMP runtime in the process"
        )
        return f"compiled C++, {_cpu.instruction_set()}, {threads}"

    def why_not(
        self, device_type: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype
    ) -> str | None:
        if device_type != "cpu":
            return f"it serves CPU tensors, and these are on {device_type}"
        if _cpu is None:
            return self.unavailable()
        for dtype in (student_dtype, teacher_dtype):
            if dtype not in DTYPE_CODES:
                return f"it has no kernel for {dtype}"
        return None

    scale = staticmethod(scale_gradient)

    def run(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        weight: Tensor | None,
        options: Options,
        want_terms: bool,
        want_grad: bool,
        inplace: bool,
    ) -> Result:
        temperature, alpha, ignore_index, label_smoothing, reduction, distill_ignored = options
        classes = student.shape[-1]
        source, student_rows = _laid_out(student)
        teacher, teacher_rows = _laid_out(teacher)
        if labels is not None:
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
            grad_rows = (1, classes, 0)
        shape = student.shape[:-1] if reduction == "none" else ()
        loss_dtype = accumulation_dtype(student.dtype)
        loss = student.new_empty(shape, dtype=loss_dtype)
        soft = torch.empty_like(loss) if want_terms else None
        hard = torch.empty_like(loss) if want_terms else None
        grad_scale = _cpu.run(
            _address("student_logits", source),
            _address("teacher_logits", teacher),
            0 if labels is None else _address("labels", labels),
            0 if weight is None else _address("weight", weight),
            0 if grad is None else grad.data_ptr(),
            loss.data_ptr(),
            0 if soft is None else soft.data_ptr(),
            0 if hard is None else hard.data_ptr(),
            student_rows,
            teacher_rows,
            grad_rows,
            student.numel() // classes,
            classes,
            DTYPE_CODES[student.dtype],
            DTYPE_CODES[teacher.dtype],
            labels is not None and labels.dtype == torch.int64,
            temperature,
            alpha,
            ignore_index,
            label_smoothing,
            REDUCTION_CODES[reduction],
            distill_ignored,
            torch.get_num_threads(),
        )
        if grad is not None and inplace and source is not student:
            grad = student.detach().copy_(grad)
        return Result(loss, soft, hard, grad, grad_scale)


def _address(name: str, tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ValueError(
            f"{name} holds no memory that a kernel could read: a freed storage, or a fake or "
            "functional tensor"
        )
    return address


def _laid_out(logits: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The logits, or a copy if their rows cannot be walked, and (inner, outer, step) of the rows.

    Row i starts ``(i // inner) * outer + (i % inner) * step`` elements in: two levels, so that
    ``logits[:, :-1]`` of a (B, L, C) tensor needs no copy.
    """
    if logits.is_neg():  # a lazy minus sign that a pointer does not show
        logits = logits.detach().resolve_neg()
    shape, strides = logits.shape, logits.stride()
    if logits.is_contiguous():
        return logits, (1, shape[-1], 0)
    groups: list[tuple[int, int]] = []  # (size, stride) of runs of leading dimensions, inner first
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if groups and groups[-1][0] * groups[-1][1] == stride:
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        elif size > 1:
            groups.append((size, stride))
    if len(groups) > 2 or (strides[-1] != 1 and shape[-1] > 1):
        return logits.detach().contiguous(), (1, shape[-1], 0)
    if len(groups) == 2:
        return logits, (groups[0][0], groups[1][1], groups[0][1])
    return logits, (1, groups[0][1] if groups else 0, 0)


def _why_not_built() -> str:
    record = Path(__file__).resolve().parent.parent / "_build.json"
    if record.exists():
        reason = json.loads(record.read_text(encoding="utf-8"))["cpu"]
        if reason:
            return f"not built at installation: {reason}"
    elif (record.parent.parent / "setup.py").exists():
        return (
            f"kdkernels was imported from its source tree {record.parent.parent}, where it was not "
            "built; run `pip install -e .` there, or start Python in another directory"
        )
    return f"its compiled module does not import: {_import_error}"
