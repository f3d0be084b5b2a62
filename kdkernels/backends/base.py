"""The narrow internal function that every backend offers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdkernels.divergences import PerRow
    from kdkernels.options import Options
    from kdkernels.teachers import Teacher


class Result(NamedTuple):
    """What one pass yields.

    ``grad`` is d(sum of loss)/d(student) times ``grad_scale``, a power of two that keeps float16
    gradients out of the subnormals; the backward divides it out, together with the scale that a
    gradient scaler puts in. It is a tensor where only the device knows it.
    """

    loss: Tensor
    soft: Tensor | None
    hard: Tensor | None
    grad: Tensor | None
    grad_scale: float | Tensor = 1.0
    metrics: tuple[Tensor, ...] = ()  # of KDMetrics, where ``Options.metrics`` asks for them


def scale_gradient(grad: Tensor, incoming: Tensor, grad_scale: float | Tensor) -> Tensor:
    """``grad`` times what flows in from above, written over ``grad``; untouched if that is 1.

    Reads ``incoming`` on the host: for CPU tensors.

    Args:
        grad: (..., C), owned by the backward.
        incoming: a scalar, or (...) for ``reduction="none"``: one factor per row.
        grad_scale: divided out.
    """
    factor: float | Tensor
    if incoming.dim() > 0:
        factor = incoming.unsqueeze(-1)
        if grad_scale != 1:
            factor = factor / grad_scale
        finite = bool(factor.isfinite().all())
    else:
        factor = incoming.item() / float(grad_scale)
        if factor == 1:
            return grad
        finite = math.isfinite(factor)
    if finite:
        return grad.mul_(factor)
    # 0 * inf: what has no gradient, such as an ignored row, has none whatever comes in.
    nothing = grad == 0
    return grad.mul_(factor).masked_fill_(nothing, 0)


def items_of(tensors: PerRow) -> tuple[Tensor | None, PerRow]:
    """What means divide by, (2,), where that is given, and the tensors of rows and classes."""
    if "num_items" not in tensors:
        return None, tensors
    return tensors["num_items"], {n: v for n, v in tensors.items() if n != "num_items"}


Function = TypeVar("Function", bound=Callable[..., Any])


def traced_as_constant(function: Function) -> Function:
    """Marks what a compiler is to call once, with constants, and not to look into.

    As torch.compiler.assume_constant_result does, without its import of the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _always() -> bool:
    return True


# Whether the backward under way runs with retain_graph=True. torch has no public name for it; one
# that drops this name costs a copy per backward, not the result.
graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", _always
)


def _never() -> bool:
    return False


# Whether a transform of torch.func (grad, vmap, jvp ...) is under way. torch has no public name for
# it; one that drops this name says itself that it cannot transform the kernels.
transforms_are_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", _never
)


# Of what can be asked for, what is left to PyTorch, as only the reference has it, begins with this.
NOT_COMPILED = "a temperature that requires grad beside "


class Backend(Protocol):
    """One implementation of the loss. Inputs of ``run`` have been checked."""

    name: str
    device_types: tuple[str, ...]  # it was made for; the reference serves any
    # What it has of ``Options.features`` and of the forms of the tensors; None: all.
    features: frozenset[str] | None
    # And what of these its fastest kernels have; the others are served by one that has everything.
    specialised: frozenset[str] | None

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine; None if it can."""

    def details(self) -> str:
        """What was found, for ``python -m kdkernels info``."""

    def why_not(
        self, device: torch.device, student_dtype: torch.dtype, teacher_dtype: torch.dtype
    ) -> str | None:
        """Why this backend cannot serve such logits; None if it can."""

    def run(
        self,
        student: Tensor,  # [..., C]
        teacher: Teacher,  # [..., C]
        labels: Tensor | None,  # [...]
        weight: Tensor | None,  # [C]
        options: Options,
        want_terms: bool,
        want_grad: bool,
        inplace: bool,
        tensors: PerRow,  # [...], or [C] of a bias
    ) -> Result:
        """Loss, and on request its terms and the gradient (``inplace``: over ``student``)."""

    def scale(self, grad: Tensor, incoming: Tensor, grad_scale: float | Tensor) -> Tensor:
        """What :func:`scale_gradient` does; a GPU backend must not make the host wait for it."""
