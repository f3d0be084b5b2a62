"""The part of DIST that lies across the batch: Huang et al. 2022, arXiv:2205.10536.

Every class is compared over the rows, so that no row has a loss of its own, and no kernel that goes
row by row can have it: on the CPU one of its own has, elsewhere PyTorch, beside the compiled part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends import Backend
from kdkernels.backends.base import graph_is_kept, scale_gradient, traced_as_constant
from kdkernels.backends.cpu import CPUBackend
from kdkernels.backends.triton_device import has_double
from kdkernels.divergences import PerRow
from kdkernels.options import Options
from kdkernels.reference import accumulation_dtype, probabilities
from kdkernels.teachers import Teacher


class _OneMinusCorrelation(torch.autograd.Function):
    """The mean over the columns of 1 - Pearson's correlation of p and q in the rows that count.

    The gradient is made in the forward: with unit vectors a, b of the centred columns it is
    (b - a - d b) / |q| where d = 1 - a·b, a fifth of what autograd would go through.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor, active: Tensor) -> Tensor:  # type: ignore[override]
        columns = _compare(q, p, active)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(q, p, active)
            ctx.grad = columns.gradient()
        nothing = columns.distance.new_zeros(())
        return torch.where(active.any(), columns.distance.mean(), nothing)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        again = torch.is_grad_enabled()  # for a second derivative
        grad = _compare(*ctx.saved_tensors).gradient() if again else ctx.grad
        return grad * incoming, None, None


class _Columns(NamedTuple):
    student: Tensor  # unit vectors b, (N, C)
    difference: Tensor  # b - a
    distance: Tensor  # 1 - a·b, (C,)
    scale: Tensor  # of the gradient: 1 / (C |q|), (C,)

    def gradient(self) -> Tensor:
        return torch.addcmul(self.difference, self.student, self.distance, value=-1) * self.scale


def _compare(q: Tensor, p: Tensor, active: Tensor) -> _Columns:
    (b, of_q), (a, of_p) = _unit_columns(q, active), _unit_columns(p, active)
    either = (of_p == 0) | (of_q == 0)  # a constant column is correlated with nothing
    difference = b - a
    # Half the squared distance of unit vectors does not cancel.
    distance = torch.where(either, 1.0, difference.square().sum(0) / 2)
    return _Columns(b, difference, distance, torch.where(either, 0.0, of_q / q.shape[1]))


def _unit_columns(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Columns, centred in the rows that count, of norm 1, and what they were multiplied with."""
    counts = active.to(x.dtype)
    centred = (x - counts.T @ x / counts.sum().clamp(min=1)) * counts
    norm = centred.square().sum(0).sqrt()
    constant = norm <= 1e-12
    scale = torch.where(constant, 0.0, 1 / torch.where(constant, 1.0, norm))
    return centred * scale, scale


@traced_as_constant
def _has_double(device: torch.device) -> bool:
    return has_double(device.type, device.index)


class IntraClass(NamedTuple):
    """What is compared with the student logits."""

    teacher: Teacher
    labels: Tensor | None
    options: Options
    tensors: PerRow

    def by_autograd(self, student: Tensor) -> Tensor:
        # A column's gradient is divided by its deviation, which may be next to nothing: in double,
        # as the CPU's kernel, wherever the device has it.
        wide = student.double() if _has_double(student.device) else student
        p, q, active = probabilities(wide, self.teacher, self.labels, self.options, self.tensors)
        columns: Tensor = _OneMinusCorrelation.apply(q, p, active)
        count = active.sum() if self.options.reduction == "sum" else 1
        return (columns * self.factor * count).to(accumulation_dtype(student.dtype))

    @property
    def factor(self) -> float:
        """What the mean over the columns is multiplied with in the loss, but for the rows' sum."""
        o = self.options
        weight = next(term.weight for term in o.divergence if term.name == "dist")
        t2 = o.temperature**2 if o.scale_by_t2 else 1.0
        return o.alpha * o.intra_class * weight * t2

    def is_plain(self, student: Tensor) -> bool:
        """Whether the logits are compared as they are."""
        o, classes = self.options, student.shape[-1]
        whole = isinstance(self.teacher, Tensor) and self.teacher.shape[-1] == classes
        as_they_are = o.softcap is None and o.student_scale == o.teacher_scale == 1
        return whole and as_they_are and not self.tensors and o.num_classes in (None, classes)

    def active(self, student: Tensor) -> Tensor:
        """Which rows take part: (...), bool."""
        if self.labels is None or self.options.distill_ignored:
            return torch.ones(student.shape[:-1], dtype=torch.bool)
        return self.labels != self.options.ignore_index


def compiled(
    student: Tensor, call: IntraClass, active: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """What is added to the loss, and its gradient, by the CPU's kernel."""
    assert isinstance(call.teacher, Tensor)
    factor = call.factor
    if call.options.reduction == "sum":
        factor *= int(active.sum())
    value, grad = _CPU.compare_columns(
        student, call.teacher, active, call.options, factor, want_grad
    )
    return torch.tensor(factor * value, dtype=accumulation_dtype(student.dtype)), grad


_CPU = CPUBackend()


class _Compiled(torch.autograd.Function):
    """The same of the logits by the CPU's kernel."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: IntraClass) -> Tensor:  # type: ignore[override]
        wanted = ctx.needs_input_grad[0]
        added, ctx.grad = compiled(student, call, call.active(student), wanted)
        if wanted:
            ctx.call = call
            ctx.save_for_backward(student)
        return added

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (student,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            alias = student.view_as(student)  # whose hooks are for this gradient alone
            value = ctx.call.by_autograd(alias)
            (grad,) = torch.autograd.grad(value, alias, incoming, create_graph=True)
            return grad, None
        grad = ctx.grad
        if graph_is_kept():
            grad = grad.clone()  # what is handed over may be modified by whoever receives it
        else:
            ctx.grad = None
        return scale_gradient(grad, incoming, 1.0).to(student.dtype), None


def with_intra_class(
    result: Any,
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    options: Options,
    tensors: PerRow,
    backend: Backend,
) -> Any:
    """``result``, a loss or named terms, with alpha · T² · dist_gamma · the mean over the classes
    of 1 - Pearson's correlation of their columns added."""
    call = IntraClass(teacher, labels, options, tensors)
    if isinstance(backend, CPUBackend) and call.is_plain(student):
        added = _Compiled.apply(student, call)
    else:
        added = call.by_autograd(student)
    return with_added(result, added, options)


def with_added(result: Any, added: Tensor, options: Options) -> Any:
    """A loss or named terms with what is ``added`` to the soft one, alpha included."""
    if isinstance(result, Tensor):
        return result + added
    soft = result.soft + added.detach() / options.alpha
    return result._replace(loss=result.loss + added, soft=soft)
