// One call of the loss, or of the scaling of its gradient, on a GPU. Nothing here waits for it.
#pragma once
#include "problem.cuh"

// Blocks that one launch has at most, and what the caller provides for them.
constexpr int kMaxBlocks = 4096;
constexpr int kMaxCountBlocks = 63;
constexpr int64_t kWorkspaceBytes = 8 * (2 * kMaxBlocks + 4 * (kMaxCountBlocks + 1) + 2);

// Fills in what the launch decides: counts, partials, arrivals, chunk, power.
void kd_cuda_run(KdCudaProblem& p, int device, void* stream, void* workspace);
void kd_cuda_scale(const KdScaling& s, int device, void* stream);

// Why no kernel of this module runs on the device; empty if they do.
const char* kd_cuda_why_not(int device);
