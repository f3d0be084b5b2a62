"""The fused loss in Triton: temperature softmax of both rows, KL divergence and cross entropy, and
the gradient. The twin of ``csrc/cpu/rows.inl`` and ``csrc/row_math.inl``, to the same numbers.

A program takes a tile of rows. Where the tile stays in registers the logits are read once; longer
rows are swept block by block, and again for the gradient. Exponentials are float32, what a row has
one of is float64, and a row for which float32 is not enough is swept again in double.

Compiled without contraction of ``a * b + c``: a student equal to its teacher then leaves a gradient
of exactly 0. Where one rounding is wanted, ``tl.fma`` says so.
"""

from kdkernels.backends.triton_kernels.batch import (
    count_kernel,
    finish_kernel,
    numbers_kernel,
    scale_kernel,
    scales_kernel,
    sum_kernel,
)
from kdkernels.backends.triton_kernels.general import general_kernel, table_kernel
from kdkernels.backends.triton_kernels.rows import again_kernel, rows_kernel
from kdkernels.backends.triton_kernels.state import GENERAL_SCALES, SCALES, Asked, Mixture

__all__ = [
    "GENERAL_SCALES",
    "SCALES",
    "Asked",
    "Mixture",
    "again_kernel",
    "count_kernel",
    "finish_kernel",
    "general_kernel",
    "numbers_kernel",
    "rows_kernel",
    "scale_kernel",
    "scales_kernel",
    "sum_kernel",
    "table_kernel",
]
