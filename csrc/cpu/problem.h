// What the CPU's units share: the problem, and the memory that a thread needs for it.
#pragma once
#include "../problem.h"

enum KdDivergence : int {
  kForwardKL = 0,
  kReverseKL = 1,
  kJensenShannon = 2,
  kSkewForwardKL = 3,
  kSkewReverseKL = 4,
  kTotalVariation = 5,
  kAlphaDivergence = 6,
  kRenyi = 7,
  kDecoupled = 8
};
constexpr int kMaxTerms = 8;

// A term of a mixture of divergences. The pointers, if any, hold one value per row.
struct KdTerm {
  KdDivergence kind;
  double weight, parameter, second;
  const double *row_weight, *row_parameter;
};

struct KdProblem : KdLoss {
  // The soft term, unless it is the forward KL alone at one temperature.
  bool general;
  bool decoupled;  // term[0] is kDecoupled, and the only one; it needs a label in every active row
  double teacher_temperature;
  int terms;
  KdTerm term[kMaxTerms];

  // Filled in by kd_run before the rows are visited.
  KdScales scales;
  bool in_double;  // one of the inputs is float64
  bool stream;     // the gradient is too large to be found in the caches by whoever reads it
  double* soft;    // [rows] T^2 KL
  double* hard;    // [rows] cross entropy
};

// Elements handled between two looks at the running maximum: both rows' blocks stay in L1.
constexpr int64_t kBlock = 2048;

// Doubles that one thread needs for kd_rows_*: three rows of exponentials (blocks, where one sweep
// is all), each rounded up to whole cache lines, and two maxima per block; between the sweeps of
// other divergences a row and two blocks more.
KD_INLINE int64_t kd_scratch_row(const KdProblem& p) {
  return (((p.grad || p.general) && p.classes > kBlock ? p.classes : kBlock) + 15) / 16 * 16;
}
KD_INLINE int64_t kd_scratch_size(const KdProblem& p) {
  return 3 * kd_scratch_row(p) + 2 * (p.classes / kBlock + 1) +
         (p.general ? kd_scratch_row(p) + 2 * kBlock : 0);
}

// Rows [begin, end) with one instruction set; `scratch` is 64-byte aligned.
typedef void (*KdRowsFn)(const KdProblem& p, int64_t begin, int64_t end, char* scratch);
extern "C" void kd_rows_portable(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx2(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx512(const KdProblem&, int64_t, int64_t, char*);
