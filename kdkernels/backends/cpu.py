"""The compiled CPU backend: hands pointers and strides to ``csrc/cpu``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels.backends.base import Result
from kdkernels.reference import accumulation_dtype

if TYPE_CHECKING:
    from kdkernels.functional import Options

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
        threads = torch.get_num_threads() if _cpu.has_openmp() else 1
        shared = "torch's OpenMP" if _cpu.has_openmp() else "no OpenMP runtime in the process"
        return f"compiled C++, {_cpu.instruction_set()}, {threads} threads ({shared})"

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
        student_rows = _rows(student)
        if student_rows is None:
            source = student.detach().contiguous()
            student_rows = (1, 0, classes)
        else:
            source = student
        teacher_rows = _rows(teacher)
        if teacher_rows is None:
            teacher = teacher.detach().contiguous()
            teacher_rows = (1, 0, classes)
        if labels is not None:
            if labels.dtype not in (torch.int64, torch.int32):
                labels = labels.long()
            labels = labels.contiguous()
        if weight is not None:
            weight = weight.to(torch.float64).contiguous()

        grad: Tensor | None = None
        grad_rows = (1, 0, classes)
        if want_grad:
            if inplace:
                grad, target = student.detach(), source.detach()
                if source is not student:
                    target = source  # class stride is not 1: written aside, copied back below
                else:
                    grad_rows = student_rows
            else:
                grad = target = torch.empty(
                    student.shape, dtype=student.dtype, device=student.device
                )
        shape = student.shape[:-1] if reduction == "none" else ()
        loss_dtype = accumulation_dtype(student.dtype)
        loss = torch.empty(shape, dtype=loss_dtype)
        soft = torch.empty(shape, dtype=loss_dtype) if want_terms else None
        hard = torch.empty(shape, dtype=loss_dtype) if want_terms else None
        grad_scale = _cpu.run(
            source.data_ptr(),
            teacher.data_ptr(),
            0 if labels is None else labels.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if grad is None else target.data_ptr(),
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
        if inplace and grad is not None and source is not student:
            grad.copy_(target)
        return Result(loss, soft, hard, grad, grad_scale)


def _rows(logits: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride) of the rows, in elements; None if they need a copy.

    Row i starts ``(i // inner) * outer + (i % inner) * inner_stride`` elements in: two levels, so
    that ``logits[:, :-1]`` needs no copy.
    """
    shape, strides = logits.shape, logits.stride()
    if logits.is_contiguous():
        return 1, shape[-1], 0
    if strides[-1] != 1 and shape[-1] > 1:
        return None
    groups: list[tuple[int, int]] = []  # (size, stride) of runs of leading dimensions
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if groups and groups[-1][0] * groups[-1][1] == stride:
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        return None
    if not groups:
        return 1, 0, 0
    if len(groups) == 1:
        return 1, groups[0][1], 0
    return groups[0][0], groups[1][1], groups[0][1]


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
