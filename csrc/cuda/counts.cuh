// Counts the labels and adds up the class weights, where that is too much for every block of the
// rows' kernel to do for itself.
#pragma once
#include "kernel.cuh"

namespace {

struct KdCounting {
  KdCudaProblem problem;
  KdCounts* counts;
  double* partials;  // [blocks][4]
  unsigned* arrivals;
};

KD_DEVICE KdCounts add_up_counts(Block& block, double (&sums)[3], double (&max_weight)[1]) {
  block.max(max_weight);
  return block.template conclude<1, KdCounts>(
      sums, [&](const double (&t)[3]) { return KdCounts{t[0], t[1], t[2], max_weight[0]}; });
}

KD_KERNEL(kMaxThreads) counts_kernel(KD_PARAMETER KdCounting c) {
  const KdCudaProblem& p = c.problem;
  Block block;
  const int64_t first = static_cast<int64_t>(block_index()) * block.size() + block.rank();
  const int64_t step = static_cast<int64_t>(grid_blocks()) * block.size();
  double counted[2] = {0, 0}, weights = 0, max_weight[1] = {-INFINITY};
  if (p.labels)
    for (int64_t row = first; row < p.rows; row += step) count_label(p, row, counted);
  for (int64_t k = first; p.weight && k < p.classes; k += step) {
    weights += p.weight[k];
    max_weight[0] = max_nan(max_weight[0], p.weight[k]);
  }
  double sums[3] = {counted[0], counted[1], weights};
  const KdCounts mine = add_up_counts(block, sums, max_weight);
  double* partial = c.partials + 4 * block_index();
  if (block.rank() == 0) {
    partial[0] = mine.soft_rows, partial[1] = mine.hard_weight;
    partial[2] = mine.weight_sum, partial[3] = mine.max_weight;
  }
  if (!is_last_block(c.arrivals)) return;
  const bool has_one = block.rank() < grid_blocks();
  const double* theirs = c.partials + 4 * block.rank();
  for (int n = 0; n < 3; ++n) sums[n] = has_one ? read_fresh(theirs + n) : 0;
  max_weight[0] = has_one ? read_fresh(theirs + 3) : -INFINITY;
  KdCounts all = add_up_counts(block, sums, max_weight);
  if (!p.labels) all.soft_rows = static_cast<double>(p.rows);
  if (!p.weight) all.weight_sum = static_cast<double>(p.classes), all.max_weight = 1;
  if (block.rank() == 0) *c.counts = all;
}

}  // namespace
