// The fused kernel: temperature softmax of both rows, KL divergence and cross entropy, and the
// gradient. Sweep 1 collects the row's statistics and leaves the exponentials in scratch (the
// student's in the gradient row itself where that is of the same type); sweep 2 only rescales them.
// Beside the gradient only a thread's scratch rows are written, which stay in its cache; a large
// gradient goes past the caches, and then the student's exponentials are in scratch, too. Rows of
// few classes are computed side by side instead, one in each lane.
//
// This source is compiled once per instruction set by the two-line files beside it. All of it has
// internal linkage, but for the two entry points: an inline function shared by the linker could
// bring AVX code to a machine without AVX.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "columns.h"
#include "problem.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#include "vectors.inl"

#include "../row_math.inl"

#include "../divergence_math.inl"

#include "elements.inl"

#include "transpose.inl"

#include "sweeps.inl"

#include "loops.inl"

#include "policies.inl"

#include "divergences.inl"

#include "jobs.inl"

#include "effective.inl"

#include "describe.inl"

#include "top_k.inl"

#include "passes.inl"

#include "groups.inl"

#include "narrow.inl"

#include "columns.inl"

// Rows of one kind that are under way together. What is left over of them goes its own way.
void visit_group(const KdProblem& p, Group& group, char* scratch) {
  is_narrow(p) ? visit_narrow(p, group, scratch) : visit_wide(p, group, scratch);
  for (int k = 0; k < group.count; ++k) {
    Good good = group.good[k];
    if (group.odd[k]) good = visit<float>(p, group.row[k], scratch);
    if (good != kAll) visit_again(p, group.row[k], good, scratch);
  }
  group.count = 0;
}

void visit_alone(const KdProblem& p, int64_t row, char* scratch) {
  const Good good = p.in_double ? kNothing : visit<float>(p, row, scratch);
  if (good != kAll) visit_again(p, row, good, scratch);
}

}  // namespace

extern "C" void KD_ENTRY(const KdProblem& p, int64_t begin, int64_t end, char* scratch) {
  const int64_t width = element_size(p.student_dtype);
  const int size = group_size(p);
  Group groups[2] = {};  // without the cross entropy and with it
  for (int64_t i = begin; i < end; ++i) {
    p.soft[i] = p.hard[i] = 0;
    if (p.plan) p.added[i] = 0;
    if (p.soft_active(i) && p.row_weight(i) != 0) {
      if (p.plan) {
        visit_plan(p, i, scratch);
        continue;
      }
      if (size == 1) {
        visit_alone(p, i, scratch);
        continue;
      }
      const Power power = power_of(p, i);
      Group& group = groups[power != kNoCrossEntropy];
      group.power = power;
      group.row[group.count++] = i;
      if (group.count == size) visit_group(p, group, scratch);
    } else if (p.grad) {  // not even read: it may hold NaN
      memset((char*)p.grad + p.grad_rows.start(i) * width, 0, p.classes * width);
    }
  }
  for (Group& group : groups)
    if (group.count) visit_group(p, group, scratch);
  if (p.stream) finish_streams();
}

extern "C" void KD_COLUMNS_ENTRY(const KdColumns& c, KdColumnsStep step, int64_t begin, int64_t end,
                                 char* scratch) {
  c.in_float64 ? visit_columns<double>(c, step, begin, end, scratch)
               : visit_columns<float>(c, step, begin, end, scratch);
}
