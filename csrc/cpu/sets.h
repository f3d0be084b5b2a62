// The instruction sets that the kernels are compiled for, and the one in use.
#pragma once
#include "columns.h"
#include "problem.h"

struct KdSet {
  const char* name;
  KdRowsFn rows;
  KdColumnsFn columns;
};

// The best of this machine, or the one that KDKERNELS_CPU names.
const KdSet& kd_set();
