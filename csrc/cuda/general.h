// One call of whatever a plan asks for (csrc/plan.h), on a GPU. Nothing here waits for it.
#pragma once
#include "../plan.h"

// What the whole batch decides for each of its rows.
struct KdGeneralScales {
  double plan_scale, hard_scale, added_scale;  // of the gradients
  double soft_rows, hard_weight, added_rows;   // what the means divide by
  double weight_sum;                           // of the class weights, C without any
};

struct KdGeneralProblem : KdLoss {
  KdPlan plan;
  KdOutput out;
  double* grad_scale;       // null, or where float16's power of two goes
  KdGeneralScales* scales;  // found on the device
  double* terms;            // [3][rows]: soft, hard, added
  double* scratch;          // [blocks][kRowsOfScratch][scratch_row]
  int64_t scratch_row;

  KD_INLINE double row_weight(int64_t row) const {
    return plan.sample_weight ? plan.sample_weight[row] : 1.0;
  }
};
static_assert(sizeof(KdGeneralProblem) <= 4096, "no more fits the parameters of a kernel");

// Of the memory that the caller provides.
int64_t kd_general_bytes(int64_t rows, int64_t classes, int device);
// Fills in what the launch decides: scales, terms, scratch.
void kd_general_run(KdGeneralProblem& p, int device, void* stream, void* workspace);
