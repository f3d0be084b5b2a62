// The kernels for students of float16.
#include "kernel.cuh"

const KdRowsKernels& kd_rows_kernels_f16(bool same_type, bool fast) {
  static const KdRowsKernels same[] = {KD_ROWS_KERNELS(Float16, true, false),
                                       KD_ROWS_KERNELS(Float16, true, true)};
  static const KdRowsKernels mixed = KD_ROWS_KERNELS(Float16, false, false);
  return same_type ? same[fast] : mixed;
}
