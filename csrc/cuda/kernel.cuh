// The kernel around the rows: each team takes every so-manieth row; the block's terms are added up,
// and the last block to finish adds up all blocks'. Nothing depends on which block that is: the
// same inputs give the same bits. One launch does the whole loss and its gradient.
#pragma once
#include "kernels.h"
#include "rows.cuh"

namespace {

// The sums a block computes over all labels. Labels out of range count as active: their row's loss
// is NaN, and so is the mean.
struct Count {
  double soft_rows, hard_weight;
};
KD_DEVICE void count_label(const KdCudaProblem& p, int64_t row, double (&sums)[2]) {
  const int64_t label = p.label(row);
  const bool hard = label != p.ignore_index;
  if (hard || p.distill_ignored) sums[0] += 1;
  if (hard) sums[1] += p.weight ? p.weight[label >= 0 && label < p.classes ? label : 0] : 1;
}

// What the rows' gradients are scaled with, and the means divide by.
struct Scales {
  KdScales rows;
  double soft_rows, hard_weight;
};

KD_DEVICE void fill_scales(const KdCudaProblem& p, const Count& count, Scales& scales) {
  KdScales& rows = scales.rows;
  const bool mean = p.out.reduction == kMean;
  scales.soft_rows = mean && count.soft_rows != 0 ? count.soft_rows : 1;
  scales.hard_weight = mean && count.hard_weight != 0 ? count.hard_weight : 1;
  rows.weight_sum = p.counts ? p.counts->weight_sum : static_cast<double>(p.classes);
  rows.soft_scale = p.alpha * p.temperature / scales.soft_rows;
  rows.hard_scale = (1 - p.alpha) / scales.hard_weight;
  if (!p.grad_scale) return;
  const double power =
      float16_scale(rows.soft_scale, rows.hard_scale, p.counts ? p.counts->max_weight : 1);
  rows.soft_scale *= power;
  rows.hard_scale *= power;
  if (block_index() == 0) *p.grad_scale = power;
}

// Reading every label in every block is cheaper than a launch to count them, up to a number of rows
// that the host knows; beyond it, p.counts has been filled by one. Or the counts are given.
KD_DEVICE void find_scales(const KdCudaProblem& p, Block& block, Scales& scales) {
  Count count = {static_cast<double>(p.rows), 0};
  if (p.out.num_items) {
    count = {p.out.num_items[0], p.out.num_items[1]};
  } else if (p.counts) {
    count = {p.counts->soft_rows, p.counts->hard_weight};
  } else if (p.labels && p.out.reduction == kMean) {
    double sums[2] = {0, 0};
    for (int64_t row = block.rank(); row < p.rows; row += block.size()) count_label(p, row, sums);
    count = block.template conclude<0, Count>(
        sums, [](const double (&t)[2]) { return Count{t[0], t[1]}; });
  }
  if (block.rank() == 0) fill_scales(p, count, scales);
  block_sync();
}

// Whether all other blocks have come here before: the last one may read what they have written.
KD_DEVICE bool is_last_block(unsigned* arrivals) {
  int& last = block_shared<int>();
  block_sync();
  if (thread_index() == 0) {
    last = count_arrival(arrivals) == static_cast<unsigned>(grid_blocks()) - 1;
    if (last) *arrivals = 0;
  }
  block_sync();
  return last;
}

struct Total {
  double soft, hard;
};
KD_DEVICE Total add_up(Block& block, double (&terms)[2]) {
  return block.template conclude<1, Total>(terms,
                                           [](const double (&t)[2]) { return Total{t[0], t[1]}; });
}

KD_DEVICE void put_terms(const KdCudaProblem& p, int64_t i, double soft, double hard) {
  put(p.out.loss, p.out.in_float64, i, blend(p.alpha, soft, hard));
  put(p.out.soft, p.out.in_float64, i, soft);
  put(p.out.hard, p.out.in_float64, i, hard);
}

KD_DEVICE void reduce(const KdCudaProblem& p, Block& block, const Scales& scales,
                      double (&terms)[2]) {
  const Total mine = add_up(block, terms);
  if (thread_index() == 0) {
    p.partials[2 * block_index()] = mine.soft;
    p.partials[2 * block_index() + 1] = mine.hard;
  }
  if (!is_last_block(p.arrivals)) return;
  double sums[2] = {0, 0};
  for (int b = thread_index(); b < grid_blocks(); b += block_threads())
    for (int n = 0; n < 2; ++n) sums[n] += read_fresh(p.partials + 2 * b + n);
  const Total all = add_up(block, sums);
  if (thread_index() == 0)
    put_terms(p, 0, all.soft / scales.soft_rows, all.hard / scales.hard_weight);
}

template <typename S, bool kSameType, bool kFast, typename Team>
KD_KERNEL(kMaxThreads)
rows_kernel(KD_PARAMETER KdCudaProblem p) {
  typedef RowWork<S, kSameType, kFast, Team> Work;
  Team team;
  Block block;
  Scales& scales = block_shared<Scales>();
  // A block of Lanes holds several teams; a team of several blocks has as many of them per row.
  const int per_row = Team::kThreadsPerRow ? Team::kThreadsPerRow : block_threads();
  const int team_in_block = thread_index() / per_row, teams = block_threads() / per_row;
  Work work(p, scales.rows, team, dynamic_shared() + team_in_block * p.chunk * Work::kVectorBytes);
  const int64_t step = static_cast<int64_t>(grid_blocks()) / team.slices() * teams;
  int64_t row = static_cast<int64_t>(block_index()) / team.slices() * teams + team_in_block;

  team.start();
  if (row < p.rows) work.begin(row);  // on its way while the labels are counted
  find_scales(p, block, scales);
  const bool leads = team.rank() == 0 && team.slice() == 0;
  double terms[2] = {0, 0};
  while (row < p.rows) {
    const typename Work::Terms of_row = work.finish();
    if (leads) {
      terms[0] += of_row.soft;
      terms[1] += of_row.hard;
      if (p.out.reduction == kNone) put_terms(p, row, of_row.soft, of_row.hard);
    }
    row += step;
    if (row < p.rows) work.begin(row);
  }
  if (p.out.reduction != kNone) reduce(p, block, scales, terms);
}

}  // namespace

#define KD_ROWS_KERNELS(S, same, fast)                                           \
  {{rows_kernel<S, same, fast, Lanes<8>>, rows_kernel<S, same, fast, Lanes<32>>, \
    rows_kernel<S, same, fast, Block>, rows_kernel<S, same, fast, Cluster>},     \
   RowWork<S, same, fast, Block>::kVectorBytes}
