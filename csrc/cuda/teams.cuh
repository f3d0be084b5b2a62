// The threads that share a row: some lanes of a warp, a thread block, or a cluster of them. Each
// team adds up over its threads, always in the same order, and lets one of its warps draw the
// conclusion, as logarithms and divisions in double are dear.
#pragma once
#include "machine.cuh"

namespace {

constexpr int kMaxWarps = 16, kMaxThreads = 32 * kMaxWarps;
constexpr int kMaxCluster = 16;
constexpr int kMaxSums = 6;

template <int kLanes, typename T, int N>
KD_DEVICE void sum_lanes(unsigned mask, T (&values)[N]) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes /= 2)
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] += shuffle_xor(mask, values[n], lanes);
}
template <int kLanes, typename T, int N>
KD_DEVICE void max_lanes(unsigned mask, T (&values)[N]) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes /= 2)
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = max_nan(values[n], shuffle_xor(mask, values[n], lanes));
}

// kLanes neighbouring lanes of a warp: many short rows per block, and no barrier.
template <int kLanes>
struct Lanes {
  static constexpr int kThreadsPerRow = kLanes;
  unsigned mask;

  KD_DEVICE Lanes() {
    const int first = thread_index() % 32 / kLanes * kLanes;
    mask = kLanes == 32 ? ~0u : ((1u << (kLanes % 32)) - 1) << first;
  }
  KD_DEVICE void start() {}
  KD_DEVICE int rank() const { return thread_index() % kLanes; }
  KD_DEVICE int size() const { return kLanes; }
  KD_DEVICE int slice() const { return 0; }
  KD_DEVICE int slices() const { return 1; }

  template <typename T, int N>
  KD_DEVICE void max(T (&values)[N]) {
    max_lanes<kLanes>(mask, values);
  }
  template <int kSlot, typename Result, int N, typename F>
  KD_DEVICE Result conclude(double (&sums)[N], F conclusion) {
    sum_lanes<kLanes>(mask, sums);
    return conclusion(sums);
  }
};

constexpr int kSlots = 3, kResultBytes = 192;

struct TeamMemory {
  double sums[kMaxWarps][kMaxSums];
  double maxima[2][kMaxWarps][3];
  double peers[2][kMaxCluster][kMaxSums];
  double results[kSlots][kResultBytes / 8];
};

// A whole thread block, or all blocks of a cluster with a slice of the row each.
template <bool kCluster>
struct Blocks {
  static constexpr int kThreadsPerRow = 0;  // all of the block's
  TeamMemory& memory;
  // Of the memory that changes hands at every other barrier: what was written for the last one may
  // still be read.
  int parity = 0;

  KD_DEVICE Blocks() : memory(block_shared<TeamMemory>()) {}
  // No block of a cluster may be written to before it runs.
  KD_DEVICE void start() {
    if (kCluster) cluster_sync();
  }
  KD_DEVICE int rank() const { return thread_index(); }
  KD_DEVICE int size() const { return block_threads(); }
  KD_DEVICE int slice() const { return kCluster ? cluster_rank() : 0; }
  KD_DEVICE int slices() const { return kCluster ? cluster_blocks() : 1; }
  KD_DEVICE int lane() const { return thread_index() % 32; }
  KD_DEVICE int warp() const { return thread_index() / 32; }
  KD_DEVICE int warps() const { return block_threads() / 32; }

  template <typename T, int N>
  KD_DEVICE void max(T (&values)[N]) {
    max_lanes<32>(~0u, values);
    if (lane() == 0)
      for (int n = 0; n < N; ++n) memory.maxima[parity][warp()][n] = values[n];
    block_sync();
    for (int w = 0; w < warps(); ++w)
      for (int n = 0; n < N; ++n)
        values[n] = max_nan(values[n], static_cast<T>(memory.maxima[parity][w][n]));
    if (kCluster) {
      if (thread_index() < slices())
        for (int n = 0; n < N; ++n)
          store_to_peer(&memory.peers[parity][slice()][n], thread_index(), values[n]);
      cluster_sync();
      for (int s = 0; s < slices(); ++s)
        for (int n = 0; n < N; ++n)
          values[n] = max_nan(values[n], static_cast<T>(memory.peers[parity][s][n]));
    }
    parity ^= 1;
  }

  // The sums over the team's threads, and what `conclusion` makes of them, for all threads. It
  // stays where it is until the slot is used again.
  template <int kSlot, typename Result, int N, typename F>
  KD_DEVICE const Result& conclude(double (&sums)[N], F conclusion) {
    static_assert(sizeof(Result) <= kResultBytes && N <= kMaxSums, "TeamMemory is too small");
    sum_lanes<32>(~0u, sums);
    if (lane() == 0)
      for (int n = 0; n < N; ++n) memory.sums[warp()][n] = sums[n];
    block_sync();
    if (warp() == 0) {
      for (int n = 0; n < N; ++n) sums[n] = lane() < warps() ? memory.sums[lane()][n] : 0;
      sum_lanes<32>(~0u, sums);
      if (kCluster && lane() < slices())
        for (int n = 0; n < N; ++n)
          store_to_peer(&memory.peers[parity][slice()][n], lane(), sums[n]);
    }
    if (kCluster) cluster_sync();
    Result& result = *reinterpret_cast<Result*>(memory.results[kSlot]);
    if (warp() == 0) {
      if (kCluster) {
        for (int n = 0; n < N; ++n)
          sums[n] = lane() < slices() ? memory.peers[parity][lane()][n] : 0;
        sum_lanes<32>(~0u, sums);
      }
      const Result concluded = conclusion(sums);
      if (lane() == 0) result = concluded;
    }
    block_sync();
    parity ^= 1;
    return result;
  }
};

typedef Blocks<false> Block;
typedef Blocks<true> Cluster;

}  // namespace
