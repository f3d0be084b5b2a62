// The backward: the gradient made in the forward times what comes in from above. The factor is
// looked at on the device, where it is; if it is 1 nothing else is read.
#pragma once
#include <type_traits>

#include "elements.cuh"

namespace {

constexpr int kScaleThreads = 256;
constexpr int64_t kPiece = 16384;  // entries of a row that one block takes at a time

template <typename S, typename Real>
KD_DEVICE void scale_entry(S& entry, Real factor) {
  const Real g = to_float(entry);
  // 0 * inf: what has no gradient, such as an ignored row, has none whatever comes in.
  if (g != 0) round_to(entry, g * factor);
}

template <typename S>
KD_KERNEL(kScaleThreads)
scale_kernel(KD_PARAMETER KdScaling q) {
  typedef std::conditional_t<sizeof(S) == 8, double, float> Real;
  constexpr int kVector = 16 / sizeof(S);
  const double divisor = q.grad_scale ? *q.grad_scale : 1;
  const int64_t pieces = (q.classes + kPiece - 1) / kPiece;
  for (int64_t i = block_index(); i < q.rows * pieces; i += grid_blocks()) {
    const int64_t row = i / pieces, begin = i % pieces * kPiece;
    const double factor = value_at(q.incoming, q.incoming_dtype, row * q.incoming_stride) / divisor;
    if (factor == 1) continue;
    S* g = static_cast<S*>(q.grad) + q.grad_rows.start(row) + begin;
    const int64_t n = q.classes - begin < kPiece ? q.classes - begin : kPiece;
    const int64_t misaligned = reinterpret_cast<uintptr_t>(g) / sizeof(S) % kVector;
    const int64_t head = misaligned ? kVector - misaligned : 0;
    const int64_t body = n > head ? (n - head) / kVector : 0;
    for (int64_t k = thread_index(); k < body; k += block_threads()) {
      Real values[kVector];
      S* vector = g + head + k * kVector;
      read_vectors(vector, values);
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (values[e] != 0) values[e] *= static_cast<Real>(factor);
      write_vector(vector, values);
    }
    for (int64_t k = thread_index(); k < n - body * kVector; k += block_threads())
      scale_entry(g[k < head ? k : k + body * kVector], static_cast<Real>(factor));
  }
}

}  // namespace
