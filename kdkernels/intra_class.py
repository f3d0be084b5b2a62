"""The part of DIST that lies across the batch: Huang et al. 2022, arXiv:2205.10536.

Every class is compared over the rows, so that no row has a loss of its own, and no kernel that goes
row by row can have it. PyTorch makes it, beside the compiled part.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdkernels.divergences import PerRow, one_minus_correlation
from kdkernels.options import Options
from kdkernels.reference import accumulation_dtype, probabilities
from kdkernels.teachers import Teacher


def with_intra_class(
    result: Any,
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    options: Options,
    tensors: PerRow,
) -> Any:
    """``result``, a loss or named terms, with alpha · T² · dist_gamma · the mean over the classes
    of 1 - Pearson's correlation of their columns added."""
    p, q = probabilities(student, teacher, labels, options, tensors)
    columns = one_minus_correlation(p.T, q.T).mean() if len(q) else q.sum()
    factor = options.temperature**2 if options.scale_by_t2 else 1.0
    count = len(q) if options.reduction == "sum" else 1
    weight = next(term.weight for term in options.divergence if term.name == "dist")
    soft = columns * (options.intra_class * factor * count * weight)
    soft = soft.to(accumulation_dtype(student.dtype))
    if isinstance(result, Tensor):
        return result + options.alpha * soft
    added = {"loss": result.loss + options.alpha * soft, "soft": result.soft + soft.detach()}
    return result._replace(**added)
