// What the CPU's units share: the problem, and the memory that a thread needs for it.
#pragma once
#include "../plan.h"

struct KdProblem : KdLoss {
  // The soft term, unless it is the forward KL alone at one temperature.
  bool general;
  bool decoupled;  // term[0] is kDecoupled, and the only one; it needs a label in every active row
  double teacher_temperature;
  int terms;
  KdTerm term[kMaxTerms];
  KdPlan* plan;  // or null, for most losses

  KD_INLINE double row_weight(int64_t row) const {
    return plan && plan->sample_weight ? plan->sample_weight[row] : 1.0;
  }

  // Filled in by kd_run before the rows are visited; the last four for a plan: what its passes'
  // gradients are multiplied with, what the mean of the added terms divides by, and these.
  KdScales scales;
  bool in_double;  // one of the inputs is float64
  bool stream;     // the gradient is too large to be found in the caches by whoever reads it
  double* soft;    // [rows] T^2 KL
  double* hard;    // [rows] cross entropy
  double plan_scale, added_scale, added_rows;
  double* added;  // [rows]
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

// For a plan: the row as it is computed with, of student and teacher, and its gradient, of one pass
// and of all; a row in double, and the classes of which a teacher says something, of two at least.
KD_INLINE int64_t kd_plan_size(const KdProblem& p) {
  return p.plan ? 6 * ((p.classes + 31) / 16 * 16) + 5 * (p.plan->top_k.k + 2) + 8 : 0;
}

// Rows [begin, end) with one instruction set; `scratch` is 64-byte aligned.
typedef void (*KdRowsFn)(const KdProblem& p, int64_t begin, int64_t end, char* scratch);
extern "C" void kd_rows_portable(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx2(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx512(const KdProblem&, int64_t, int64_t, char*);
