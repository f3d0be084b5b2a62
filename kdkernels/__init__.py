"""Fused knowledge-distillation losses for PyTorch. ``kdkernels.kd_loss`` is the front door."""

from kdkernels._version import __version__
from kdkernels.backends.cpu import empty_cache
from kdkernels.functional import kd_loss
from kdkernels.modules import FusedKDLoss
from kdkernels.reference import KDMetrics, KDTerms
from kdkernels.teachers import TopKTeacher
from kdkernels.vocab_parallel import VocabParallel

__all__ = [
    "FusedKDLoss",
    "KDMetrics",
    "KDTerms",
    "TopKTeacher",
    "VocabParallel",
    "__version__",
    "empty_cache",
    "kd_loss",
]
