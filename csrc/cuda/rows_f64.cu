// The kernels for students of float64.
#include "kernel.cuh"

const KdRowsKernels& kd_rows_kernels_f64(bool same_type, bool fast) {
  static const KdRowsKernels same = KD_ROWS_KERNELS(double, true, false);
  (void)same_type, (void)fast;
  return same;
}
