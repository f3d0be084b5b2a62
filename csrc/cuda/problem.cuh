// What one call of the GPU kernels is asked to do, as it is handed to them.
#pragma once
#include "../problem.h"

// Over all rows: what the means divide by, and what label smoothing and float16 need.
struct KdCounts {
  double soft_rows, hard_weight, weight_sum, max_weight;
};

struct KdCudaProblem : KdLoss {
  KdOutput out;
  double* grad_scale;      // null, or where float16's power of two goes
  const KdCounts* counts;  // null: each block counts for itself
  double* partials;        // [blocks][2] terms of each block's rows
  unsigned* arrivals;      // zero; left at zero
  int chunk;               // vectors of a row's slice that shared memory holds at a time
  int power;               // e^s is e^(s/T) to this power; 0: it has an exponential of its own
};

// The gradient times what comes in from above, written over it.
struct KdScaling {
  void* grad;
  KdDtype dtype;
  KdRows grad_rows;
  int64_t rows, classes;
  const void* incoming;
  KdDtype incoming_dtype;
  int64_t incoming_stride;   // elements from row to row; 0: one factor for all
  const double* grad_scale;  // null, or divided out
};
