// What the CPU's units share: the problem, and the memory that a thread needs for it.
#pragma once
#include "../problem.h"

struct KdProblem : KdLoss {
  // Filled in by kd_run before the rows are visited.
  KdScales scales;
  bool in_double;  // one of the inputs is float64
  bool stream;     // the gradient is too large to be found in the caches by whoever reads it
  double* soft;    // [rows] T^2 KL
  double* hard;    // [rows] cross entropy
};

// Elements handled between two looks at the running maximum: both rows' blocks stay in L1.
constexpr int64_t kBlock = 2048;

// Doubles that one thread needs for kd_rows_*: three rows of exponentials (blocks, where no
// gradient is asked for), each rounded up to whole cache lines, and two maxima per block.
KD_INLINE int64_t kd_scratch_row(const KdProblem& p) {
  return ((p.grad && p.classes > kBlock ? p.classes : kBlock) + 15) / 16 * 16;
}
KD_INLINE int64_t kd_scratch_size(const KdProblem& p) {
  return 3 * kd_scratch_row(p) + 2 * (p.classes / kBlock + 1);
}

// Rows [begin, end) with one instruction set; `scratch` is 64-byte aligned.
typedef void (*KdRowsFn)(const KdProblem& p, int64_t begin, int64_t end, char* scratch);
extern "C" void kd_rows_portable(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx2(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx512(const KdProblem&, int64_t, int64_t, char*);
