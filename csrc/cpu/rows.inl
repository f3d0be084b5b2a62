// The fused kernel: temperature softmax of both rows, KL divergence and cross entropy, and the
// gradient. Sweep 1 collects the row's statistics and leaves the exponentials in scratch (the
// student's in the gradient row itself where that is of the same type); sweep 2 only rescales them.
// Beside the gradient only a thread's scratch rows are written, which stay in its cache; a large
// gradient goes past the caches, and then the student's exponentials are in scratch, too. Rows of
// few classes are computed side by side instead, one in each lane.
//
// This source is compiled once per instruction set by the two-line files beside it. All of it has
// internal linkage, but for the one entry point: an inline function shared by the linker could
// bring AVX code to a machine without AVX.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "problem.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#include "../row_math.inl"

#include "vectors.inl"

#include "elements.inl"

#include "sweeps.inl"

#include "jobs.inl"

#include "narrow.inl"

// Rows that are under way together.
void visit_group(const KdProblem& p, Job<float>* jobs, int count, char* scratch) {
  if (is_narrow(p)) {
    visit_narrow(p, jobs, count, scratch);
    for (int k = 0; k < count; ++k)
      if (jobs[k].odd) visit(p, jobs + k, 1, scratch);
  } else if (!p.in_double) {
    visit(p, jobs, count, scratch);
  }
  for (int k = 0; k < count; ++k)
    if (jobs[k].good != kAll) visit_again(p, jobs[k].row, jobs[k].good, scratch);
}

}  // namespace

extern "C" void KD_ENTRY(const KdProblem& p, int64_t begin, int64_t end, char* scratch) {
  const int64_t width = element_size(p.student_dtype);
  const int group = group_size(p);
  Job<float> jobs[kGroup];
  int count = 0;
  for (int64_t i = begin; i < end; ++i) {
    p.soft[i] = p.hard[i] = 0;
    if (p.soft_active(i)) {
      jobs[count].row = i;
      jobs[count++].good = kNothing;
    } else if (p.grad) {  // not even read: it may hold NaN
      memset((char*)p.grad + p.grad_rows.start(i) * width, 0, p.classes * width);
    }
    if (count < group && i + 1 < end) continue;
    visit_group(p, jobs, count, scratch);
    count = 0;
  }
  if (p.stream) finish_streams();
}
