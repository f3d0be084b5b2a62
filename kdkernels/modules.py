"""``FusedKDLoss``: the loss as an ``nn.Module`` that drops into an existing training loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdkernels.backends.base import transforms_are_active
from kdkernels.checks import check_weight
from kdkernels.functional import checked_loss, uncompiled_loss
from kdkernels.operators import traced_loss
from kdkernels.options import OPTION_NAMES, Prepared, prepare
from kdkernels.reference import KDMetrics, KDTerms
from kdkernels.shift import check_shift, shifted
from kdkernels.teachers import TopKTeacher
from kdkernels.vocab_parallel import VocabParallel, is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedKDLoss(nn.Module):
    """Knowledge-distillation loss, fused: ``alpha · T² · KL(p ‖ q) + (1 - alpha) · CE(r, y)``.

    With student logits s and teacher logits t, p = softmax(t/T), q = softmax(s/T), r = softmax(s)
    (Hinton, Vinyals and Dean 2015, arXiv:1503.02531). All arguments are those of
    :func:`kdkernels.kd_loss`, which documents units, errors and numerics. The options are plain
    attributes and may be changed between steps (``loss_fn.temperature = 2.0`` in a schedule).

    Args:
        temperature: T > 0, dividing both logits. Default 4.0, or what the divergence's paper has.
        alpha: share of the distillation term in [0, 1]. Default 0.9.
        weight: class weights of the cross entropy, shape (C,), kept as a buffer.
        divergence: ``"forward_kl"`` (default), or another, or a mapping of names to weights.
        **others: all that :func:`kdkernels.kd_loss` takes but ``sample_weight`` and ``num_items``,
            which go with the logits.

    Shape:
        student_logits, teacher_logits: (..., C). labels: (...), integers, or None if alpha is 1.
        sample_weight: (...), or None. num_items: a number, or None.
        Output: a scalar, or (...) with ``reduction="none"``.

    Example:
        >>> loss_fn = FusedKDLoss(temperature=4.0, alpha=0.9)
        >>> with torch.no_grad():
        ...     teacher_logits = teacher(images)
        >>> loss = loss_fn(student(images), teacher_logits, labels)
        >>> loss.backward()
    """

    weight: Tensor | None
    group: ProcessGroup | None
    shift: int
    vocab_parallel: VocabParallel | None
    ignore_index: int
    distill_ignored: bool

    def __init__(
        self,
        temperature: float | Sequence[float] | Tensor | None = None,
        alpha: float = 0.9,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        reduction: str = "mean",
        distill_ignored: bool = False,
        inplace: bool = False,
        return_terms: bool | str = False,
        backend: str | None = None,
        divergence: str | Mapping[str, float | Tensor] = "forward_kl",
        beta: float | Tensor = 0.5,
        skew: float | Tensor = 0.1,
        divergence_alpha: float = 0.5,
        dkd_alpha: float = 1.0,
        dkd_beta: float = 8.0,
        nkd_gamma: float = 1.5,
        wsld_alpha: float = 2.25,
        dist_beta: float = 1.0,
        dist_gamma: float = 1.0,
        teacher_temperature: float | None = None,
        temperature_reduction: str = "mean",
        scale_by_t2: bool = True,
        standardize: bool = False,
        taid: float | None = None,
        agreement: float = 0.0,
        entropy_gap: float = 0.0,
        agreement_reduction: str | None = None,
        teacher_weights: Sequence[float] | None = None,
        ensemble: str = "probs",
        logit_softcap: float | None = None,
        logit_scale: float | tuple[float, float] = 1.0,
        logit_bias: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        z_loss: float = 0.0,
        num_classes: int | None = None,
        group: ProcessGroup | None = None,
        shift: int = 0,
        vocab_parallel: VocabParallel | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _DEFAULTS}
        super().__init__()
        if weight is not None:
            check_weight(weight)
        for name, value in given.items():
            setattr(self, name, value)
        self.register_buffer("weight", weight)
        options = self._check().options
        if temperature is None:
            self.temperature = options.temperature

    @classmethod
    def tutorial(cls, lam: float, beta: float, tau: float, **options: Any) -> FusedKDLoss:
        """``CE + lam · E + beta · E / tau`` with ``E = -Σ_i log Σ_k p_ik q_ik``.

        The composite of a tutorial on distilling image classifiers: E, over the rows of the batch,
        is how unlikely teacher and student are to draw the same class at temperature 1, and
        ``E / tau`` its second term. The cross entropy is a mean.

        Args:
            lam, beta: weights of the two terms.
            tau: what the second is divided by, > 0.
            **options: others of :class:`FusedKDLoss`.
        """
        if not tau > 0:
            raise ValueError(f"tau must be a number > 0, got {tau!r}")
        weight = lam + beta / tau
        composite: dict[str, Any] = {
            "alpha": 0.0,
            "agreement": weight,
            "agreement_reduction": "sum",
        }
        return cls(**(composite | options))

    def _check(self) -> Prepared:
        """The options as they are now."""
        prepared = prepare({name: getattr(self, name) for name in OPTION_NAMES})
        check_shift(self.shift)
        if not isinstance(self.divergence, Mapping):  # it could change without notice
            self.__dict__["_checked"] = prepared
        return prepared

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop("_checked", None)  # whatever it is, the next call looks at it
        super().__setattr__(name, value)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopKTeacher | Sequence[Tensor],
        labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        num_items: float | Tensor | tuple[float | Tensor, float | Tensor] | None = None,
    ) -> Tensor | KDTerms | KDMetrics:
        if self.shift != 0:
            ignored = (self.ignore_index, self.distill_ignored)
            labels, sample_weight = shifted(labels, sample_weight, self.shift, *ignored)
        if torch.compiler.is_compiling() or transforms_are_active():
            given = {name: getattr(self, name) for name in OPTION_NAMES}
            rows = (labels, self.weight, sample_weight, num_items, self.group)
            if self.vocab_parallel is not None or is_dtensor(student_logits):
                rest = (self.vocab_parallel, prepare(given))
                return uncompiled_loss(student_logits, teacher_logits, *rows, *rest)
            return traced_loss(student_logits, teacher_logits, *rows, given)
        prepared = self.__dict__.get("_checked") or self._check()
        weight = self._buffers["weight"]  # where nn.Module would look for it last
        rows = (labels, weight, sample_weight, num_items, self.group)
        shard = self.vocab_parallel
        return checked_loss(student_logits, teacher_logits, *rows, shard, prepared)

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in _DEFAULTS}
        shown = {
            k: tuple(v.shape) if isinstance(v, Tensor) else v
            for k, v in options.items()
            if k in _ALWAYS_SHOWN or isinstance(v, Tensor) or v != _DEFAULTS[k]
        }
        if self.weight is not None:
            shown["weight"] = tuple(self.weight.shape)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


_ALWAYS_SHOWN = ("temperature", "alpha", "reduction")
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(FusedKDLoss).parameters.items()
    if name != "weight"
}
