// One call of the loss on the CPU: checks the labels, visits the rows, reduces.
#pragma once
#include "problem.h"

enum KdReduction : int { kMean = 0, kSum = 1, kNone = 2 };

struct KdOutput {
  KdReduction reduction;
  bool in_float64;           // of the three below; float32 otherwise
  void *loss, *soft, *hard;  // a scalar, or [rows] for kNone; the terms may be null
};

struct KdStatus {
  int64_t bad_label_row;  // -1: none. Nothing has been written otherwise.
  double grad_scale;      // the gradient is multiplied by this power of two
};

KdStatus kd_run(KdProblem& p, const KdOutput& out, int threads);

// The instruction set in use: the best of this machine, or the one KDKERNELS_CPU names.
const char* kd_instruction_set();
