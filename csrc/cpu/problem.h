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
  kDecoupled = 8,
  kNormalized = 9,     // NKD
  kWeightedSoft = 10,  // WSLD
  kCorrelation = 11,   // DIST
  kTeacherLabel = 12,  // hard distillation
  kAgreement = 13,
  kEntropyGap = 14
};
constexpr int kMaxTerms = 8;

// A term of a mixture of divergences. The pointers, if any, hold one value per row.
struct KdTerm {
  KdDivergence kind;
  double weight, parameter, second;
  const double *row_weight, *row_parameter;
};

// One of several looks at a row: a temperature, and what is computed of it.
struct KdPass {
  double temperature, teacher_temperature;
  double weight;  // of its soft term
  bool added;     // to the loss as it is: no part of the soft term, without alpha and T^2
  int terms;
  KdTerm term[kMaxTerms];
};
constexpr int kMaxPasses = 16;

// A teacher: its rows, or the k entries of each that are known.
struct KdTeacher {
  const void* logits;
  KdDtype dtype;
  KdRows rows;
  double weight;
};
enum KdEnsemble : int { kOfProbabilities = 0, kOfLosses = 1, kOfLogits = 2 };
constexpr int kMaxTeachers = 32;

enum KdTail : int { kRenormalize = 0, kBucket = 1, kZero = 2 };
struct KdTopK {
  const double* values;  // [rows, k]
  const int64_t* indices;
  int64_t k;  // 0: the teacher has whole rows
  KdTail tail;
};

// What makes a row more than one divergence of the logits as they are.
struct KdPlan {
  int passes;
  KdPass pass[kMaxPasses];
  int teachers;
  KdTeacher teacher[kMaxTeachers];
  KdEnsemble ensemble;
  KdTopK top_k;
  bool standardize, scale_by_t2, sum_added;
  double softcap;  // 0: none
  double student_scale, teacher_scale;
  const double *student_bias, *teacher_bias;      // [classes], or null
  double teacher_share;                           // of TAID's mixture of logits; 1: none
  const double *row_temperature, *sample_weight;  // [rows], or null
  double* metrics;  // [rows][4]: entropies of student and teacher, agreement, accuracy; or null

  // Filled in by kd_run: what a row's share of the gradient is multiplied with, and what the mean
  // of `added` divides by.
  double soft_scale, added_scale, added_rows;
  double* added;  // [rows]
};

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

// For a plan: the row as it is computed with, of student and teacher, and its gradient, of one pass
// and of all; and a row in double.
KD_INLINE int64_t kd_plan_size(const KdProblem& p) {
  return p.plan ? 6 * ((p.classes + 31) / 16 * 16) + 5 * (p.plan->top_k.k + 1) + 8 : 0;
}

// Rows [begin, end) with one instruction set; `scratch` is 64-byte aligned.
typedef void (*KdRowsFn)(const KdProblem& p, int64_t begin, int64_t end, char* scratch);
extern "C" void kd_rows_portable(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx2(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx512(const KdProblem&, int64_t, int64_t, char*);
