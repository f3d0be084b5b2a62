// The kernel that serves all that the specialised ones do not, and its launch: one block finds what
// the rows' gradients are scaled with, a grid computes the rows, one block adds up their terms.
// Each in an order of its own: the same inputs give the same bits, whatever the grid.
#include "general.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "general.cuh"
#include "run.h"

namespace {

// Two blocks share a multiprocessor: one computes while the other waits at a barrier.
constexpr int kGeneralThreads = 256;
// Of scratch memory, at most: what the L2 cache does not hold costs time.
constexpr int64_t kScratchBytes = int64_t{1} << 28;

// ---- before the rows ----------------------------------------------------------------------------

struct LargestFactors {
  double of_terms[kMaxPlanTerms];
};

KD_DEVICE double largest_size(const Classes& rows, const double* values, double otherwise) {
  return values ? rows.max([&](int64_t i) { return fabs(values[i]); }) : otherwise;
}

// At most the largest entry of a row's gradient by its passes, where the forward KL's is 1.
KD_DEVICE double largest_gradient(const KdGeneralProblem& p, const Classes& rows) {
  LargestFactors& largest = block_shared<LargestFactors>();
  const KdPlan& plan = p.plan;
#pragma unroll 1
  for (int k = 0; k < plan.terms; ++k) {
    const KdTerm& t = plan.term[k];
    const double size = largest_size(rows, t.row_weight, fabs(t.weight));
    if (rows.leads()) largest.of_terms[k] = size * largest_factor(t);
  }
  rows.sync();
  const double own = largest_size(rows, plan.row_temperature, 0);
  double total = 0;
#pragma unroll 1
  for (int k = 0; k < plan.passes; ++k) {
    const KdPass& pass = plan.pass[k];
    double terms = 0;
    for (int n = 0; n < pass.terms; ++n) terms += largest.of_terms[pass.first + n];
    const double t = plan.row_temperature && !pass.added ? own : pass.temperature;
    total += largest_factor(plan, pass, p.alpha, t, terms);
  }
  return total;
}

KD_KERNEL(kGeneralThreads) general_scales_kernel(KD_PARAMETER KdGeneralProblem p) {
  Block block;
  const Classes rows(p.rows, block), classes(p.classes, block);
  Numbers<2> counted = rows.sums<2>([&](int64_t row, double (&sums)[2]) {
    const double w = p.row_weight(row);
    if (p.soft_active(row)) sums[0] += w;
    if (!p.hard_active(row)) return;
    const int64_t label = p.label(row);  // out of range: the row's loss is NaN, and so is the mean
    sums[1] += w * (p.weight ? p.weight[label >= 0 && label < p.classes ? label : 0] : 1);
  });
  if (p.out.num_items) counted.of[0] = p.out.num_items[0], counted.of[1] = p.out.num_items[1];
  const bool mean = p.out.reduction == kMean;
  KdGeneralScales s;
  s.soft_rows = mean && counted.of[0] != 0 ? counted.of[0] : 1;
  s.hard_weight = mean && counted.of[1] != 0 ? counted.of[1] : 1;
  s.added_rows = p.plan.sum_added ? 1 : s.soft_rows;
  s.weight_sum = p.weight ? classes.sum([&](int64_t i) { return p.weight[i]; })
                          : static_cast<double>(p.classes);
  double power = 1;
  if (p.grad_scale) {
    const double scale = p.plan.student_scale > 1 ? p.plan.student_scale : 1;
    const double scaled = scale * largest_size(rows, p.plan.sample_weight, 1);
    const double of_passes = largest_gradient(p, rows) / s.added_rows;
    power = float16_scale(of_passes * scaled,
                          (1 - p.alpha) / s.hard_weight * scaled * (1 + 64 * p.z_loss),
                          largest_size(classes, p.weight, 1));
  }
  s.plan_scale = p.alpha / s.soft_rows * power;
  s.hard_scale = (1 - p.alpha) / s.hard_weight * power;
  s.added_scale = power / s.added_rows;
  if (!rows.leads()) return;
  *p.scales = s;
  if (p.grad_scale) *p.grad_scale = power;
}

// ---- the rows, and after them -------------------------------------------------------------------

KD_DEVICE void put_terms(const KdGeneralProblem& p, int64_t i, double soft, double hard,
                         double added) {
  put(p.out.loss, p.out.in_float64, i, blend(p.alpha, soft, hard) + added);
  put(p.out.soft, p.out.in_float64, i, soft);
  put(p.out.hard, p.out.in_float64, i, hard);
}

KD_KERNEL(kGeneralThreads, 2) general_kernel(KD_PARAMETER KdGeneralProblem p) {
  Block block;
  const Classes classes(p.classes, block);
  GeneralRow of_block(p, *p.scales, classes,
                      p.scratch + block_index() * kRowsOfScratch * p.scratch_row);
#pragma unroll 1
  for (int64_t row = block_index(); row < p.rows; row += grid_blocks()) {
    const GeneralRow::Terms terms = of_block.visit(row);
    if (!classes.leads()) continue;
    p.terms[row] = terms.soft, p.terms[p.rows + row] = terms.hard;
    p.terms[2 * p.rows + row] = terms.added;
    if (p.out.reduction == kNone) put_terms(p, row, terms.soft, terms.hard, terms.added);
  }
}

KD_KERNEL(kGeneralThreads) general_sums_kernel(KD_PARAMETER KdGeneralProblem p) {
  Block block;
  const Classes rows(p.rows, block);
  const Numbers<3> total = rows.sums<3>([&](int64_t row, double (&sums)[3]) {
    for (int k = 0; k < 3; ++k) sums[k] += p.terms[k * p.rows + row];
  });
  const KdGeneralScales& s = *p.scales;
  if (rows.leads())
    put_terms(p, 0, total.of[0] / s.soft_rows, total.of[1] / s.hard_weight,
              total.of[2] / s.added_rows);
}

// ---- the launch ---------------------------------------------------------------------------------

int resident(int threads, int device) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> known;  // to ask the driver takes longer than to launch
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, threads});
  if (found != known.end()) return found->second;
  const int blocks = resident_blocks(general_kernel, {1, threads, 1, 0}, device_limits(device));
  if (blocks == 0) throw std::runtime_error("CUDA: no block of the kernel fits this GPU");
  return known[{device, threads}] = blocks;
}

int64_t rounded_up(int64_t numbers) { return (numbers + 15) / 16 * 16; }

Launch rows_launch(int64_t rows, int64_t classes, int device) {
  // Eight classes per thread: short rows do not wait for barriers of many warps.
  int threads = 32;
  while (threads < kGeneralThreads && threads * 8 < classes) threads *= 2;
  const int64_t fits = kScratchBytes / (8 * kRowsOfScratch * rounded_up(classes));
  const int64_t blocks = std::min<int64_t>({rows, resident(threads, device), fits});
  return {static_cast<int>(std::max<int64_t>(1, blocks)), threads, 1, 0};
}

}  // namespace

int64_t kd_general_bytes(int64_t rows, int64_t classes, int device) {
  const OnDevice current(device);
  const Launch shape = rows_launch(rows, classes, device);
  const int64_t scratch = shape.blocks * kRowsOfScratch * rounded_up(classes);
  return static_cast<int64_t>(sizeof(KdGeneralScales)) + 8 * (rounded_up(3 * rows) + scratch + 16);
}

void kd_general_run(KdGeneralProblem& p, int device, void* stream, void* workspace) {
  const OnDevice current(device);
  const Launch shape = rows_launch(p.rows, p.classes, device);
  p.scratch = static_cast<double*>(workspace);
  p.scratch_row = rounded_up(p.classes);
  p.terms = p.scratch + shape.blocks * kRowsOfScratch * p.scratch_row;
  p.scales = reinterpret_cast<KdGeneralScales*>(p.terms + rounded_up(3 * p.rows));
  const Launch alone = {1, kGeneralThreads, 1, 0};
  launch(general_scales_kernel, alone, stream, p);
  if (p.rows > 0) launch(general_kernel, shape, stream, p);
  if (p.out.reduction != kNone) launch(general_sums_kernel, alone, stream, p);
}
