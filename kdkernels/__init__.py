"""Fused knowledge-distillation losses for PyTorch. ``kdkernels.kd_loss`` is the front door."""

from kdkernels._version import __version__
from kdkernels.functional import kd_loss
from kdkernels.modules import FusedKDLoss
from kdkernels.reference import KDTerms

__all__ = ["FusedKDLoss", "KDTerms", "__version__", "kd_loss"]
