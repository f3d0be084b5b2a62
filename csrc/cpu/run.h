// One call of the loss on the CPU: checks the labels, visits the rows, reduces.
#pragma once
#include "problem.h"

struct KdStatus {
  int64_t bad_label_row;  // -1: none. Nothing has been written otherwise.
  double grad_scale;      // the gradient is multiplied by this power of two
};

KdStatus kd_run(KdProblem& p, const KdOutput& out, int threads);
