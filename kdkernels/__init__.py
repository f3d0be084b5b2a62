"""Fused knowledge-distillation losses for PyTorch. ``kdkernels.kd_loss`` is the front door."""

from kdkernels.functional import kd_loss
from kdkernels.modules import FusedKDLoss
from kdkernels.reference import KDTerms

__version__ = "0.1.0"
__all__ = ["FusedKDLoss", "KDTerms", "__version__", "kd_loss"]
