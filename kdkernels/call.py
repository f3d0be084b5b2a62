"""One call of the loss, as its backward and its second derivative need it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kdkernels.backends import Backend
from kdkernels.divergences import PerRow
from kdkernels.options import Options
from kdkernels.teachers import Teacher, tensors_of


class Call(NamedTuple):
    """What one call of the loss is asked to do, beside the student logits.

    In one object, as autograd charges for each argument; and it does not see these tensors, which
    have no gradient and of which it could not save those made in inference mode.
    """

    teacher: Teacher
    labels: Tensor | None
    weight: Tensor | None
    options: Options
    backend: Backend
    inplace: bool
    want_terms: bool
    tensors: PerRow

    def versions(self) -> list[int]:
        """What in-place writes have counted up to; writes to inference tensors are not counted."""
        constants = [t for t in (self.labels, self.weight) if t is not None]
        if isinstance(self.teacher, Tensor):
            constants.append(self.teacher)
        else:
            constants += tensors_of(self.teacher)
        if self.tensors:
            constants += self.tensors.values()
        try:
            return [t._version for t in constants]
        except RuntimeError:  # inference tensors have none; asking each of them takes longer
            return [t._version for t in constants if not t.is_inference()]

    def check_unmodified(self, versions: list[int]) -> None:
        """Raise RuntimeError if a tensor was written to since it had ``versions``."""
        if self.versions() != versions:
            raise RuntimeError(
                "teacher_logits, labels, weight or another tensor of the loss have been modified "
                "by an inplace operation since it was computed: no second derivative "
                "(create_graph=True)"
            )
