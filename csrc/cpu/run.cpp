#include "run.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pieces.h"
#include "sets.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#include "../row_math.inl"

// Below this many elements (rows * classes) waking a second thread costs more than
// it saves: see benchmarks/NOTES.md.
constexpr int64_t kParallelWork = 32768;
// Rows are handed out in pieces of about this many classes, so that a delayed thread holds up
// little; the results do not depend on who computes them.
constexpr int64_t kPieceWork = 32768;

struct Counts {
  int64_t bad_label_row = -1;
  double soft = 0;  // rows of the soft term, or the weights that they are given
  double hard = 0;  // the same of the cross entropy, times class weights
};

Counts count(const KdProblem& p) {
  Counts c;
  for (int64_t i = 0; i < p.rows; ++i) {
    const double row_weight = p.row_weight(i);
    if (p.soft_active(i)) c.soft += row_weight;
    if (!p.hard_active(i)) continue;
    const int64_t label = p.label(i);
    if (label < 0 || label >= p.classes) {
      c.bad_label_row = i;
      return c;
    }
    c.hard += row_weight * (p.weight ? p.weight[label] : 1.0);
  }
  return c;
}

double max_weight(const KdProblem& p) {
  return p.weight && p.classes ? *std::max_element(p.weight, p.weight + p.classes) : 1;
}

double largest_of(const double* values, int64_t n, double otherwise) {
  return values && n ? *std::max_element(values, values + n) : otherwise;
}

double largest_factor(const KdTerm* terms, int count, int64_t rows) {
  double total = 0;
  for (int k = 0; k < count; ++k) {
    double largest = std::fabs(terms[k].weight);
    if (const double* own = terms[k].row_weight)
      for (int64_t i = 0; i < rows; ++i) largest = std::max(largest, std::fabs(own[i]));
    total += largest_factor(terms[k]) * largest;
  }
  return total;
}

double largest_gradient(const KdProblem& p) {
  if (!p.plan) return p.general ? largest_factor(p.term, p.terms, p.rows) : 1;
  const KdPlan& plan = *p.plan;
  double total = 0;
  for (int k = 0; k < plan.passes; ++k) {
    const KdPass& pass = plan.pass[k];
    const double t =
        largest_of(pass.added ? nullptr : plan.row_temperature, p.rows, pass.temperature);
    const double terms = largest_factor(plan.term + pass.first, pass.terms, p.rows);
    total += largest_factor(plan, pass, p.alpha, t, terms);
  }
  return total;
}

// From here on a gradient is written past the caches: see benchmarks/NOTES.md.
constexpr int64_t kStreamBytes = int64_t{1} << 22;

int64_t gradient_bytes(const KdProblem& p) {
  const int64_t width = p.student_dtype == kFloat64 ? 8 : p.student_dtype == kFloat32 ? 4 : 2;
  return p.rows * p.classes * width;
}

// First touch of a large fresh gradient costs more in page faults than its arithmetic.
void ask_for_huge_pages(const KdProblem& p) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p.grad);
  const uintptr_t end = begin + static_cast<uintptr_t>(gradient_bytes(p));
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (p.grad && p.grad != p.student && first < last)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)p;
#endif
}

void visit_piece(const void* problem, int64_t begin, int64_t end, char* scratch) {
  kd_set().rows(*static_cast<const KdProblem*>(problem), begin, end, scratch);
}

void visit_rows(const KdProblem& p, int threads) {
  const bool is_small = p.rows * p.classes < kParallelWork;
  kd_in_pieces(p.rows, is_small ? p.rows : kPieceWork / p.classes, is_small ? 1 : threads,
               (kd_scratch_size(p) + kd_plan_size(p)) * 8, visit_piece, &p);
}

double sum(const double* values, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

}  // namespace

KdStatus kd_run(KdProblem& p, const KdOutput& out, int threads) {
  Counts counts = count(p);
  if (counts.bad_label_row >= 0) return {counts.bad_label_row, 1};
  if (out.num_items) counts.soft = out.num_items[0], counts.hard = out.num_items[1];

  const bool mean = out.reduction == kMean;
  const double soft_rows = mean && counts.soft != 0 ? counts.soft : 1;
  const double hard_rows = mean && counts.hard != 0 ? counts.hard : 1;
  p.scales.weight_sum = p.weight ? sum(p.weight, p.classes) : static_cast<double>(p.classes);
  p.scales.soft_scale = p.alpha * p.soft_factor / p.temperature / soft_rows;
  p.scales.hard_scale = (1 - p.alpha) / hard_rows;
  const double own = p.plan ? largest_of(p.plan->sample_weight, p.rows, 1) : 1;
  const double scaled = p.plan ? std::max(p.plan->student_scale, 1.0) * own : 1;
  const double summed = p.plan && p.plan->sum_added ? 1 : 1 / soft_rows;
  const double of_soft = p.plan ? summed : p.scales.soft_scale;
  const double grad_scale =
      p.grad && p.student_dtype == kFloat16
          ? float16_scale(of_soft * largest_gradient(p) * scaled,
                          p.scales.hard_scale * scaled * (1 + 64 * p.z_loss), max_weight(p))
          : 1;
  p.scales.soft_scale *= grad_scale;
  p.scales.hard_scale *= grad_scale;
  p.in_double = p.student_dtype == kFloat64 || p.teacher_dtype == kFloat64;
  p.stream = p.grad && p.grad != p.student && gradient_bytes(p) >= kStreamBytes;
  std::vector<double> terms(static_cast<size_t>((p.plan ? 3 : 2) * p.rows));
  p.soft = terms.data();
  p.hard = terms.data() + p.rows;
  if (p.plan) {
    p.added = terms.data() + 2 * p.rows;
    p.plan_scale = p.alpha / soft_rows * grad_scale;
    p.added_rows = p.plan->sum_added ? 1 : soft_rows;
    p.added_scale = grad_scale / p.added_rows;
  }

  ask_for_huge_pages(p);
  visit_rows(p, threads);

  const int64_t results = out.reduction == kNone ? p.rows : 1;
  for (int64_t i = 0; i < results; ++i) {
    const bool rows = out.reduction == kNone;
    const double soft = rows ? p.soft[i] : sum(p.soft, p.rows) / soft_rows;
    const double hard = rows ? p.hard[i] : sum(p.hard, p.rows) / hard_rows;
    double loss = blend(p.alpha, soft, hard);
    if (p.plan) loss += rows ? p.added[i] : sum(p.added, p.rows) / p.added_rows;
    put(out.loss, out.in_float64, i, loss);
    put(out.soft, out.in_float64, i, soft);
    put(out.hard, out.in_float64, i, hard);
  }
  return {-1, grad_scale};
}
