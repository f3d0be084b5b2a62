// Rows that take more than one look: every kind of plan, in buffers of the exact size, so that the
// sanitizers see whatever is read or written beside them. Included by test_rows.cpp.
#pragma once
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/run.h"

enum PlanKind {
  kStandardized,
  kTemperatures,
  kPerRow,
  kMapped,
  kMixed,
  kMeanOfProbabilities,
  kMeanOfLosses,
  kMeanOfLogits,
  kRenormalized,
  kWithBucket,
  kWithZero,
  kNKD,
  kWSLD,
  kDIST,
  kHardLabels,
  kAdded,
  kPlanKinds
};

inline void fill_plan(KdPlan& plan, PlanKind kind, const std::vector<double>& numbers) {
  const auto pass = [&](double t, KdDivergence divergence, bool added) {
    KdPass& to = plan.pass[plan.passes++];
    to = {t, t, 1, added, plan.terms, 1};
    plan.term[plan.terms++] = {divergence, 1, 0.6, 0, nullptr, nullptr};
  };
  const KdDivergence of_kind = kind == kNKD          ? kNormalized
                               : kind == kWSLD       ? kWeightedSoft
                               : kind == kDIST       ? kCorrelation
                               : kind == kHardLabels ? kTeacherLabel
                                                     : kForwardKL;
  pass(2, of_kind, false);
  if (kind == kTemperatures) pass(3.3, kJensenShannon, false), pass(4, kDecoupled, false);
  if (kind == kTemperatures) plan.term[2].second = 2;
  if (kind == kAdded) pass(1, kAgreement, true), pass(1, kEntropyGap, true);
  plan.standardize = kind == kStandardized;
  plan.scale_by_t2 = true;
  plan.student_scale = plan.teacher_scale = plan.teacher_share = 1;
  if (kind == kMapped) plan.softcap = 4, plan.student_scale = 0.5, plan.teacher_scale = 2;
  if (kind == kMapped) plan.student_bias = plan.teacher_bias = numbers.data();
  if (kind == kMixed) plan.teacher_share = 0.3;
  if (kind == kPerRow) plan.row_temperature = plan.sample_weight = numbers.data();
  plan.ensemble = kind == kMeanOfLosses   ? kOfLosses
                  : kind == kMeanOfLogits ? kOfLogits
                                          : kOfProbabilities;
}

inline bool check_plan(PlanKind kind, int64_t classes, KdDtype dtype, bool want_grad, bool inplace,
                       std::mt19937& random) {
  const int64_t rows = 3, k = classes < 5 ? classes : 5;
  const int64_t size = rows * classes, numbers_size = classes > rows ? classes : rows;
  std::normal_distribution<double> normal(0, 3);
  std::vector<float> s32(size), t32(size), u32(size), g32(size);
  std::vector<double> s64(size), t64(size), u64(size), g64(size), numbers(numbers_size), loss(rows);
  for (int64_t i = 0; i < size; ++i) {
    s64[i] = s32[i] = static_cast<float>(normal(random));
    t64[i] = t32[i] = static_cast<float>(normal(random));
    u64[i] = u32[i] = static_cast<float>(normal(random));
  }
  for (double& x : numbers) x = 0.5 + std::fabs(normal(random));
  std::vector<int64_t> labels(rows), indices(rows * k);
  std::vector<double> values(rows * k), metrics(rows * 4);
  for (int64_t i = 0; i < rows; ++i) {
    labels[i] = i == 1 ? -100 : static_cast<int64_t>(random() % classes);
    for (int64_t j = 0; j < k; ++j) {
      indices[i * k + j] = (j * 7 + i) % classes;
      values[i * k + j] = -2.0 - static_cast<double>(j);
    }
    for (int64_t j = 1; j < k; ++j)  // of few classes: none twice
      for (int64_t l = 0; l < j; ++l)
        if (indices[i * k + j] == indices[i * k + l]) {
          indices[i * k + j] = (indices[i * k + j] + 1) % classes;
          l = -1;
        }
  }
  const bool wide = dtype == kFloat64;
  KdPlan plan = {};
  fill_plan(plan, kind, numbers);
  plan.metrics = metrics.data();
  KdProblem p = {};
  p.plan = &plan;
  p.student = wide ? static_cast<const void*>(s64.data()) : s32.data();
  p.teacher = wide ? static_cast<const void*>(t64.data()) : t32.data();
  void* const out = wide ? static_cast<void*>(g64.data()) : g32.data();
  p.grad = !want_grad ? nullptr : inplace ? const_cast<void*>(p.student) : out;
  const KdRows contiguous = {1, classes, 0};
  const bool several = kind >= kMeanOfProbabilities && kind <= kMeanOfLogits;
  const bool top_k = kind >= kRenormalized && kind <= kWithZero;
  if (top_k)
    plan.top_k = {values.data(), indices.data(), k, static_cast<KdTail>(kind - kRenormalized)};
  else
    plan.teacher[plan.teachers++] = {p.teacher, dtype, contiguous, several ? 0.4 : 1};
  if (several) {
    const void* const other = wide ? static_cast<const void*>(u64.data()) : u32.data();
    plan.teacher[plan.teachers++] = {other, dtype, contiguous, 0.6};
  }
  p.labels = labels.data();
  p.student_dtype = p.teacher_dtype = dtype;
  p.student_rows = p.teacher_rows = p.grad_rows = contiguous;
  p.labels_are_int64 = p.want_soft = p.want_hard = p.general = true;
  p.rows = rows;
  p.classes = classes;
  p.ignore_index = -100;
  p.temperature = p.teacher_temperature = 2;
  p.soft_factor = 4;
  p.alpha = 0.7;
  p.z_loss = kind == kMapped ? 0.01 : 0;
  kd_run(p, {kNone, true, loss.data(), nullptr, nullptr, nullptr}, 2);
  bool good = true;
  for (const double x : loss) good &= std::isfinite(x);
  for (const double x : metrics) good &= std::isfinite(x);
  for (int64_t i = 0; i < size; ++i) good &= std::isfinite(wide ? g64[i] : g32[i]);
  if (!good) std::printf("FAILED plan %d classes %ld\n", kind, static_cast<long>(classes));
  return good;
}
