// What makes a row more than one forward KL of the logits as they are: several temperatures,
// teachers and divergences, logits that are mapped, rows with options of their own. Plain C types
// only, for the CPU's and the GPU's units; kdkernels/backends/plan.py fills it in.
#pragma once
#include "problem.h"

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
constexpr int kMaxTerms = 8;  // of one mixture

// A term of a mixture of divergences. The pointers, if any, hold one value per row.
struct KdTerm {
  KdDivergence kind;
  double weight, parameter, second;
  const double *row_weight, *row_parameter;
};

// One of several looks at a row: a temperature, and what is computed of it.
struct KdPass {
  double temperature, teacher_temperature;
  double weight;     // of its soft term
  bool added;        // to the loss as it is: no part of the soft term, without alpha and T^2
  int first, terms;  // of KdPlan::term
};
constexpr int kMaxPasses = 16;
constexpr int kMaxPlanTerms = 16;  // of all looks; those at other temperatures share them

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

struct KdPlan {
  int passes;
  KdPass pass[kMaxPasses];
  int terms;
  KdTerm term[kMaxPlanTerms];
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
};

// At most the largest entry of a row's gradient, where 1 is forward KL's. Of the others q log(q /
// p) is a quarter of the range of log(q / p), which logits of any use do not make 256; powers
// outside [0, 1] have no bound, and get what room there is.
KD_INLINE double largest_factor(const KdTerm& t) {
  const double size = t.parameter < 0 ? -t.parameter : t.parameter;
  switch (t.kind) {
    case kForwardKL:
    case kTotalVariation:
      return 1;
    case kAlphaDivergence:
    case kRenyi:
      return t.parameter < 0 || t.parameter > 1 ? 1024 : 16;
    case kDecoupled:
      return size + (t.second < 0 ? -t.second : t.second);
    case kNormalized:
    case kWeightedSoft:
    case kCorrelation:
      return 1 + 4 * size;
    default:
      return 16;
  }
}

// The same of a pass, T^2 / T included, whose terms come to `terms`. A standardised row is divided
// by its deviation, which may be small: there is room for 1/64.
KD_INLINE double largest_factor(const KdPlan& plan, const KdPass& pass, double alpha,
                                double temperature, double terms) {
  const double t = plan.scale_by_t2 && temperature > 1 ? temperature : 1;
  return (pass.added ? 1 : alpha * t) * pass.weight * terms * (plan.standardize ? 64 : 1);
}
