"""The compiled CPU backend: hands pointers and strides to ``csrc/cpu``."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels.backends.base import Result, items_of, scale_gradient
from kdkernels.backends.native import DTYPE_CODES, REDUCTION_CODES, address, laid_out, why_not_built
from kdkernels.backends.plan import asks_for_plan, needs_plan, plan_of
from kdkernels.divergences import DIVERGENCES, FORWARD_KL, Term, of_term
from kdkernels.reference import accumulation_dtype
from kdkernels.teachers import TopKTeacher, logits_of

if TYPE_CHECKING:
    from kdkernels.divergences import PerRow
    from kdkernels.options import Options
    from kdkernels.teachers import Teacher

try:
    # After torch, whose libgomp the kernel then finds and shares.
    from kdkernels import _cpu
except ImportError as error:
    _cpu = None  # type: ignore[assignment]
    _import_error = str(error)


def _let_native_code_look() -> None:
    """torch describes its tensors to native code from 2.10 on; without that no call is plain."""
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _cpu is None or table is None:
        return
    # TypeError, ValueError: a table of another kind or version, which a later torch may bring.
    with contextlib.suppress(TypeError, ValueError):
        _cpu.use_tensors(table, [torch.Tensor, torch.nn.Parameter])


_let_native_code_look()


# From here on gradients lie in memory that csrc/cpu/memory.cpp keeps from step to step: fresh pages
# cost a step more than its arithmetic.
KEPT_BYTES = 1 << 22


def _new_gradient(student: Tensor) -> Tensor:
    """Contiguous and not initialised."""
    if student.nbytes < KEPT_BYTES:
        if student.is_contiguous():  # naming the format takes longer
            return torch.empty_like(student)
        return torch.empty_like(student, memory_format=torch.contiguous_format)
    memory = _cpu.Memory(student.nbytes)
    return torch.frombuffer(memory, dtype=student.dtype).resize_(student.shape)


@functools.lru_cache(maxsize=256)
def _native(options: Options) -> _cpu.Options:
    plain = options.divergence == FORWARD_KL and options.teacher_temperature is None
    mixture = [] if plain or needs_plan(options) else options.divergence
    return _cpu.Options(
        options.temperature,
        options.alpha,
        options.ignore_index,
        options.label_smoothing,
        REDUCTION_CODES[options.reduction],
        options.distill_ignored,
        options.teacher_temperature or options.temperature,
        options.temperature**2 if options.scale_by_t2 else 1.0,
        [(DIVERGENCES[t.name].code, t.weight, t.parameter, t.second) for t in mixture],
    )


def _wide(values: Tensor | None) -> Tensor | None:
    """Numbers as native code reads them: contiguous float64."""
    return None if values is None else values.to(torch.float64).resolve_neg().contiguous()


def _pointer(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def _of_rows(term: Term, tensors: PerRow) -> list[Tensor | None]:
    """What native code reads of a term per row."""
    return [_wide(values) for values in of_term(term, tensors)]


def empty_cache() -> int:
    """Give back the memory that is kept for the next large gradient of CPU logits.

    A training step frees its gradient and asks for one of the same size in the next step; the CPU
    kernels keep the memory of up to two freed gradients of 4 MiB and more, as mapping fresh pages
    takes longer than the loss itself. The system may take those pages when it is short of memory.

    Returns:
        How many bytes that were.
    """
    return 0 if _cpu is None else int(_cpu.release_memory())


def _with_a_number(options: Options, tensors: PerRow) -> tuple[Options, PerRow]:
    """One temperature for all rows, which is a tensor to be learned, is a number to the kernels."""
    temperature = tensors.get("temperature")
    if temperature is None or any(temperature.stride()) or not temperature.numel():
        return options, tensors
    number = temperature.flatten()[0].item()
    others = {name: values for name, values in tensors.items() if name != "temperature"}
    return options._replace(temperature=number), others


class CPUBackend:
    name = "cpu"
    device_types: tuple[str, ...] = ("cpu",)
    features: frozenset[str] | None = None
    specialised: frozenset[str] | None = None

    def unavailable(self) -> str | None:
        return None if _cpu is not None else why_not_built("cpu", _import_error)

    def details(self) -> str:
        library = _cpu.openmp_library()
        threads = (
            f"{torch.get_num_threads()} threads of {Path(library).name}"
            if library
            else "1 thread: no OpenMP runtime in the process"
        )
        return f"compiled C++, {_cpu.instruction_set()}, {threads}"

    def why_not(
        self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype
    ) -> str | None:
        if device.type != "cpu":
            return f"it serves CPU tensors, and these are on {device.type}"
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
        teacher: Teacher,
        labels: Tensor | None,
        weight: Tensor | None,
        options: Options,
        want_terms: bool,
        want_grad: bool,
        inplace: bool,
        tensors: PerRow,
    ) -> Result:
        num_items, tensors = items_of(tensors)
        options, tensors = _with_a_number(options, tensors)
        classes = options.num_classes or student.shape[-1]
        source, student_rows = laid_out(student)
        # Of several teachers the widest: it decides whether all is computed in double.
        widest = max(logits_of(teacher), key=lambda t: t.element_size())
        is_top_k = isinstance(teacher, TopKTeacher)
        first, teacher_rows = (source, student_rows) if is_top_k else laid_out(widest)
        if labels is not None:
            if labels.dtype not in (torch.int64, torch.int32):
                labels = labels.long()
            if labels.is_neg() or not labels.is_contiguous():
                labels = labels.resolve_neg().contiguous()
        weight = _wide(weight)
        grad, grad_rows = None, student_rows
        if want_grad and inplace:
            grad = source.detach()
        elif want_grad:
            grad = _new_gradient(student)
            grad_rows = (1, student.shape[-1], 0)
        if grad is not None and classes < student.shape[-1]:
            grad[..., classes:] = 0  # which are no part of the loss
        asked = asks_for_plan(teacher, options, tensors)
        plan = plan_of(_cpu, student, teacher, options, tensors) if asked else None
        of_rows = [_of_rows(term, tensors) for term in options.divergence] if tensors else []
        shape = student.shape[:-1] if options.reduction == "none" else ()
        loss_dtype = accumulation_dtype(student.dtype)
        loss = student.new_empty(shape, dtype=loss_dtype)
        soft = torch.empty_like(loss) if want_terms else None
        hard = torch.empty_like(loss) if want_terms else None
        grad_scale = _cpu.run(
            _native(options),
            address("student_logits", source),
            address("teacher_logits", first),
            0 if labels is None else address("labels", labels),
            0 if weight is None else address("weight", weight),
            0 if grad is None else grad.data_ptr(),
            loss.data_ptr(),
            0 if soft is None else soft.data_ptr(),
            0 if hard is None else hard.data_ptr(),
            student_rows,
            teacher_rows,
            grad_rows,
            student.shape[:-1].numel(),
            classes,
            DTYPE_CODES[student.dtype],
            DTYPE_CODES[first.dtype],
            labels is not None and labels.dtype == torch.int64,
            torch.get_num_threads(),
            [tuple(map(_pointer, pair)) for pair in of_rows],
            None if plan is None else plan.native,
            options.z_loss,
            _pointer(num_items),
        )
        if grad is not None and inplace and source is not student:
            grad = student.detach().copy_(grad)
        metrics = () if plan is None else plan.reduced(student, labels, options, tensors)
        return Result(loss, soft, hard, grad, grad_scale, metrics)

    def compare_columns(
        self,
        student: Tensor,
        teacher: Tensor,
        active: Tensor,
        options: Options,
        scale: float,
        want_grad: bool,
    ) -> tuple[float, Tensor | None]:
        """The mean over the classes of 1 - the correlation of their columns, and ``scale`` times
        its gradient, in the dtype of the loss.

        Args:
            student, teacher: (..., C), compared at the temperatures of ``options``.
            active: (...), bool: the rows that count.
        """
        dtype = accumulation_dtype(student.dtype)
        of_student, student_rows = laid_out(student)
        of_teacher, teacher_rows = laid_out(teacher)
        active = active.contiguous()
        grad = None
        if want_grad:
            is_wide = dtype == student.dtype
            grad = _new_gradient(student) if is_wide else torch.empty(student.shape, dtype=dtype)
        value: float = _cpu.compare_columns(
            address("student_logits", of_student),
            address("teacher_logits", of_teacher),
            active.data_ptr(),
            0 if grad is None else grad.data_ptr(),
            student_rows,
            teacher_rows,
            student.shape[:-1].numel(),
            student.shape[-1],
            DTYPE_CODES[student.dtype],
            DTYPE_CODES[teacher.dtype],
            dtype == torch.float64,
            options.temperature,
            options.teacher_temperature or options.temperature,
            scale,
            torch.get_num_threads(),
        )
        return value, grad


class PlainCPUBackend(CPUBackend):
    """The short way to the same kernels, for calls that need no preparation.

    A small batch costs less than looking at its tensors from Python: native code looks at them
    itself, and says no to whatever it is not sure of, which then takes the long way through the
    argument checks.
    """

    def serves(self, student: Any, teacher: Any, labels: Any) -> bool:
        """Whether these are sound arguments, and contiguous float and label tensors on the CPU."""
        return _cpu is not None and _cpu.is_plain(student, teacher, labels)

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
        """As :class:`Backend`'s, without weight, want_terms, inplace and tensors."""
        assert isinstance(teacher, Tensor)  # or it were not plain
        assert labels is not None
        grad = _new_gradient(student) if want_grad else None
        if options.reduction == "none":
            loss = student.new_empty(student.shape[:-1], dtype=accumulation_dtype(student.dtype))
        else:
            loss = torch.empty_like(_SCALARS[student.dtype])  # new_empty takes twice as long
        threads = torch.get_num_threads()
        grad_scale = _cpu.run_plain(_native(options), student, teacher, labels, grad, loss, threads)
        return Result(loss, None, None, grad, grad_scale)


_SCALARS = {
    dtype: torch.empty((), dtype=accumulation_dtype(dtype), device="cpu") for dtype in DTYPE_CODES
}
