"""The Triton backend: NVIDIA, AMD and Intel GPUs, without a compiler at installation.

Launches ``triton_kernels``, which is imported when it is first needed: Triton is optional, and
takes its time. Nothing here makes the host wait for the device, unless ``KDKERNELS_CHECK_LABELS=1``
asks for a look at the labels.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels.backends import triton_general, triton_mixture
from kdkernels.backends.base import Result, items_of
from kdkernels.backends.native import address, laid_out
from kdkernels.backends.reference import check_labels
from kdkernels.backends.triton_device import (
    current,
    current_target,
    has_double,
    interpreted,
    launch_options,
    warp_size,
    why_no_device,
)
from kdkernels.backends.triton_mixture import in_two_parts
from kdkernels.backends.triton_shapes import GENERAL, PLAIN, shape_of
from kdkernels.reference import accumulation_dtype

if TYPE_CHECKING:
    from kdkernels.divergences import PerRow
    from kdkernels.options import Options
    from kdkernels.teachers import Teacher

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE_TYPES = ("cuda", "xpu")  # AMD's are "cuda" to torch

# Labels and terms that one program adds up before several share the work.
SHARE = 65536
COUNTED = 1024  # at a time
MAX_PARTS = 1024
AGAIN_PROGRAMS = 1024  # that look for rows to be done again
# Of ``Options.features``, what has kernels of its own; the general one has all.
SPECIALISED = frozenset(
    {
        *(f"divergence {name}" for name in (*triton_mixture.WEIGHTS, "dkd")),
        "a teacher_temperature of its own",
        "scale_by_t2=False",
    }
)


@functools.cache
def _kernels() -> ModuleType:
    from kdkernels.backends import triton_kernels

    return triton_kernels


def _bits(value: float, has_double: bool) -> int:
    """A number as the integer that Triton passes unchanged; floats it would round to float32."""
    floating, integer = ("<d", "<q") if has_double else ("<f", "<i")
    return int(struct.unpack(integer, struct.pack(floating, value))[0])


class TritonBackend:
    name = "triton"
    device_types: tuple[str, ...] = DEVICE_TYPES
    features: frozenset[str] | None = None
    specialised: frozenset[str] | None = SPECIALISED

    def unavailable(self) -> str | None:
        return why_no_device()

    def details(self) -> str:
        import triton

        if interpreted():
            return f"Triton {triton.__version__}, interpreter on the CPU (TRITON_INTERPRET=1): slow"
        target = current_target()
        return f"Triton {triton.__version__}, {target.backend} {target.arch}"

    def why_not(
        self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype
    ) -> str | None:
        if interpreted():
            if device.type != "cpu":
                return f"TRITON_INTERPRET=1 is set: it serves CPU tensors, not {device.type}"
        elif device.type not in DEVICE_TYPES:
            return f"it serves GPU tensors, and these are on {device.type}"
        reason = why_no_device()
        if reason is not None:
            return reason
        for dtype in (student_dtype, teacher_dtype):
            if dtype not in DTYPES:
                return f"it has no kernel for {dtype}"
            if dtype == torch.float64 and not has_double(device.type, device.index):
                return "the GPU has no float64"
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
        if labels is not None and os.environ.get("KDKERNELS_CHECK_LABELS") == "1":
            classes = options.num_classes or student.shape[-1]
            check_labels(labels, classes, options.ignore_index)
        if not isinstance(teacher, Tensor) or _is_general(options, frozenset(tensors)):
            call = (student, teacher, labels, weight, options, want_terms, want_grad, inplace)
            return triton_general.run(_kernels(), *call, tensors)
        num_items, tensors = items_of(tensors)
        shape = student.shape[:-1] if options.reduction == "none" else ()
        loss = student.new_empty(shape, dtype=accumulation_dtype(student.dtype))
        soft = torch.empty_like(loss) if want_terms else None
        hard = torch.empty_like(loss) if want_terms else None
        source, student_rows = laid_out(student)
        grad, grad_rows = None, student_rows
        if want_grad and inplace:
            grad = source.detach()
        elif want_grad:
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
            grad_rows = (1, student.shape[-1], 0)
        if student.numel() == 0:
            for out in (loss, soft, hard):
                if out is not None:
                    out.zero_()
            return Result(loss, soft, hard, grad)
        with current(student.device):
            launch = _Launch(student, teacher, labels, weight, options, want_terms, tensors)
            scales = launch.scales(grad is not None, num_items)
            launch.rows(source, student_rows, grad, grad_rows, inplace, scales, (loss, soft, hard))
        if grad is not None and inplace and source is not student:
            grad = student.detach().copy_(grad)
        grad_scale: float | Tensor = 1.0
        if student.dtype == torch.float16:
            scale_at = _kernels().SCALES - 1
            grad_scale = scales[scale_at : scale_at + 1]
        return Result(loss, soft, hard, grad, grad_scale)

    def scale(self, grad: Tensor, incoming: Tensor, grad_scale: float | Tensor) -> Tensor:
        if grad.numel() == 0:
            return grad
        factors = incoming.detach().unsqueeze(-1)
        source, (inner, outer, step) = laid_out(grad)
        if source is not grad:  # neighbouring classes are not neighbours in memory
            scaled = grad * (factors.to(torch.float64) / grad_scale).to(grad.dtype)
            return grad.copy_(torch.where(grad == 0, grad, scaled))
        factors, (factor_inner, factor_outer, factor_step) = laid_out(factors)
        if incoming.dim() == 0:
            factor_inner, factor_outer, factor_step = 1, 0, 0
        classes = grad.shape[-1]
        rows = grad.numel() // classes
        block = min(max(16, 1 << (classes - 1).bit_length()), 2048)
        tile = 2048 // block
        columns = -(-classes // block)
        programs = min(-(-rows // tile), max(1, 4096 // columns))
        with current(grad.device):
            kernels = _kernels()
            kernels.scale_kernel[(programs, columns)](
                grad,
                factors,
                grad_scale if isinstance(grad_scale, Tensor) else None,
                rows,
                classes,
                inner,
                outer,
                step,
                factor_inner,
                factor_outer,
                factor_step,
                WIDE=_wide(has_double(grad.device.type, grad.device.index)),
                R=tile,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=False,
            )
        return grad


def _wide(has_double: bool) -> Any:
    import triton.language as tl

    return tl.float64 if has_double else tl.float32


@functools.lru_cache(maxsize=256)
def _is_general(options: Options, tensors: frozenset[str]) -> bool:
    """Whether it takes the general kernel: slower, and able to do everything."""
    others = {"temperature", "sample_weight", "student_bias", "teacher_bias"}
    return bool(options.features - SPECIALISED or tensors & others)


class _Launch:
    """The launches of one call, with what they share."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        weight: Tensor | None,
        options: Options,
        want_terms: bool,
        tensors: PerRow,
    ) -> None:
        self.options, self.student, self.want_terms = options, student, want_terms
        self.teacher, self.teacher_rows = laid_out(teacher)
        self.classes = student.shape[-1]
        self.count = student.numel() // self.classes
        self.has_double = has_double(student.device.type, student.device.index)
        self.wide = torch.float64 if self.has_double else torch.float32
        self.soft = options.alpha > 0 or want_terms
        self.hard = labels is not None and (options.alpha < 1 or want_terms)
        if labels is not None:
            if labels.dtype not in (torch.int64, torch.int32):
                labels = labels.long()
            labels = labels.resolve_neg().contiguous()
        self.labels = labels
        self.weight = None
        if weight is not None and self.hard:
            self.weight = weight.detach().to(self.wide).resolve_neg().contiguous()
        # Without a divergence the temperature plays no part, and e^s is the only exponential.
        self.temperature = options.temperature if self.soft else 1.0
        self.general: triton_mixture.General | None = None
        self.per_row: tuple[Tensor | None, ...] | None = None
        if self.soft and (options.features or tensors):
            self.general = triton_mixture.general(options, frozenset(tensors))
            wide = {name: self.wide_rows(tensors[name]) for name in tensors}
            self.per_row = (*(wide.get(name) for name in triton_mixture.PER_ROW), None)

    def wide_rows(self, values: Tensor) -> Tensor:
        return values.detach().to(self.wide).resolve_neg().contiguous()

    def new(self, *shape: int) -> Tensor:
        return self.student.new_empty(shape, dtype=self.wide)

    def parts(self) -> tuple[int, int]:
        """How many programs share the rows' labels and terms, and the share of each."""
        parts = min(MAX_PARTS, -(-self.count // SHARE))
        return parts, -(-self.count // parts)

    def scales(self, want_grad: bool, num_items: Tensor | None) -> Tensor:
        """The numbers that ``triton_kernels/state.py`` lists."""
        kernels, options, wide = _kernels(), self.options, _wide(self.has_double)
        mean = options.reduction == "mean"
        counts = None
        parts, share = self.parts()
        if mean and num_items is None and self.labels is not None and parts > 1:
            counts = self.new(2, parts)
            kernels.count_kernel[(parts,)](
                self.labels,
                self.weight,
                counts,
                self.count,
                share,
                self.classes,
                options.ignore_index,
                WIDE=wide,
                BLOCK=COUNTED,
            )
        exponent = math.log2(math.e) / self.temperature
        numbers = [self.temperature, options.alpha, options.label_smoothing]
        numbers += in_two_parts([exponent])
        numbers += [self.temperature if options.scale_by_t2 else 1 / self.temperature]
        float16 = want_grad and self.student.dtype == torch.float16
        scales = self.general_numbers(float16)
        kernels.scales_kernel[(1,)](
            self.labels,
            self.weight,
            counts,
            None if num_items is None else num_items.to(self.wide),
            scales,
            self.count,
            parts,
            self.classes,
            options.ignore_index,
            *(_bits(number, self.has_double) for number in numbers),
            GENERAL=self.general is not None,
            MEAN=mean,
            DISTILL_IGNORED=options.distill_ignored,
            FLOAT16=float16,
            WIDE=wide,
            BLOCK=COUNTED,
            enable_fp_fusion=False,
        )
        return scales

    def general_numbers(self, float16: bool) -> Tensor:
        """Memory for the scales, with what there is of them where the soft term is not plain."""
        kernels = _kernels()
        if self.general is None:
            return self.new(kernels.SCALES)
        scales = self.new(kernels.GENERAL_SCALES)
        largest = self.general.largest if float16 else ()
        kernels.numbers_kernel[(1,)](
            scales,
            in_two_parts(self.general.numbers),
            largest,
            self.per_row,
            self.count,
            WIDE=_wide(self.has_double),
            BLOCK=COUNTED,
        )
        return scales

    def rows(
        self,
        source: Tensor,
        student_rows: tuple[int, int, int],
        grad: Tensor | None,
        grad_rows: tuple[int, int, int],
        inplace: bool,
        scales: Tensor,
        results: tuple[Tensor, Tensor | None, Tensor | None],
    ) -> None:
        """The loss, its terms, and the gradient."""
        import triton.language as tl

        kernels, options = _kernels(), self.options
        in_double = torch.float64 in (source.dtype, self.teacher.dtype)
        device = self.student.get_device()
        warp = warp_size(device)
        regimes, registers = PLAIN, 200
        if self.general is not None:
            regimes, registers = GENERAL, 255
        shape = shape_of(self.classes, regimes.in_double if in_double else regimes.in_float, warp)
        terms = None if options.reduction == "none" else self.new(2, self.count)
        again = self.has_double and not in_double
        flags = source.new_empty(self.count, dtype=torch.int8) if again else None
        address("student_logits", source)
        address("teacher_logits", self.teacher)
        compiled = self.general.compiled if self.general else None
        power = 0
        if self.hard:
            power = int(self.temperature) if self.temperature in (1, 2, 3, 4) else -1
        asked = kernels.Asked(
            distill_ignored=options.distill_ignored,
            soft=self.soft,
            soft_grad=options.alpha > 0 and grad is not None,
            power=power,
            hard_grad=self.hard and options.alpha < 1 and grad is not None,
            smooth=self.hard and options.label_smoothing > 0,
            weighted=self.weight is not None,
            grad=grad is not None,
            inplace=inplace,
            two_levels=any(r[0] != 1 for r in (student_rows, self.teacher_rows, grad_rows)),
            mixture=kernels.Mixture(*compiled) if compiled else None,
            decoupled=compiled == (),
        )
        arguments = (
            source,
            self.teacher,
            grad,
            self.labels,
            self.weight,
            scales,
            terms,
            *results,
            flags,
            self.per_row,
            self.count,
            self.classes,
            options.ignore_index,
            *student_rows,
            *self.teacher_rows,
            *grad_rows,
            asked,
        )
        kernels.rows_kernel[(-(-self.count // shape.rows),)](
            *arguments,
            REAL=tl.float64 if in_double else tl.float32,
            R=shape.rows,
            BLOCK=shape.block,
            RESIDENT=shape.resident,
            **launch_options(shape.threads, device, registers),
        )
        if again:
            shape = shape_of(self.classes, regimes.again, warp)
            kernels.again_kernel[(min(self.count, AGAIN_PROGRAMS),)](
                *arguments,
                BLOCK=shape.block,
                **launch_options(shape.threads, device, registers),
            )
        if terms is not None:
            self.finish(terms, scales, results)

    def finish(
        self,
        terms: Tensor,  # [2, rows]
        scales: Tensor,
        results: tuple[Tensor, Tensor | None, Tensor | None],
    ) -> None:
        """One loss for all rows."""
        kernels, wide = _kernels(), _wide(self.has_double)
        parts, share = self.parts()
        if parts > 1:
            sums = self.new(2, parts)
            kernels.sum_kernel[(parts,)](terms, sums, self.count, share, WIDE=wide, BLOCK=COUNTED)
            terms = sums
        kernels.finish_kernel[(1,)](
            terms,
            scales,
            *results,
            terms.shape[1],
            WIDE=wide,
            BLOCK=COUNTED,
            enable_fp_fusion=False,
        )
