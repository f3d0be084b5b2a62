// The kernels that the units of csrc/cuda hold, for the launcher: one unit per student type, so
// that they are compiled side by side.
#pragma once
#include "problem.cuh"

typedef void (*KdRowsKernel)(KdCudaProblem);

// Who shares a row.
enum KdTeam : int { kLanes8 = 0, kLanes32 = 1, kOneBlock = 2, kBlockCluster = 3 };

struct KdRowsKernels {
  KdRowsKernel by_team[4];
  int vector_bytes;  // of shared memory, for the 16 bytes of the student and their teacher's
                     // classes
};

// same_type: the teacher has the student's type. fast: exponentials by the special-function units;
// for 16-bit types that are the same.
const KdRowsKernels& kd_rows_kernels_f32(bool same_type, bool fast);
const KdRowsKernels& kd_rows_kernels_bf16(bool same_type, bool fast);
const KdRowsKernels& kd_rows_kernels_f16(bool same_type, bool fast);
const KdRowsKernels& kd_rows_kernels_f64(bool same_type, bool fast);
