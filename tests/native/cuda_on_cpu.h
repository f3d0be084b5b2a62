// Stands in for csrc/cuda/device.cuh: the CUDA kernels as they are, run on the CPU. Each GPU thread
// is a fibre; the fibres of a cluster take turns, those of a grid's clusters follow one another.
// Barriers, shuffles and the other blocks' shared memory behave as on the GPU. The special-function
// unit errs by up to two units of the last place, as the GPU's may. Shared memory starts as NaN.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define KD_DEVICE inline
#define KD_KERNEL(...) void
#define KD_PARAMETER const

// ---- fibres -------------------------------------------------------------------------------------

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct ShimBlock {
  int index, rank;
  Barrier barrier;
  std::map<const void*, std::vector<char>> statics;
  char* dynamic;
  struct Group {  // lanes that shuffle together
    Barrier barrier;
    double deposits[2][32];  // taken in turns: the last ones may still be read
  };
  std::vector<std::map<unsigned, Group>> warps;
};

struct Fibre {
  ShimBlock* block;
  int thread;
  bool started = false, finished = false;
  jmp_buf at;
  ucontext_t first;
};

struct Shim {
  int grid_blocks, block_threads, cluster;
  Barrier cluster_barrier;
  std::vector<std::unique_ptr<ShimBlock>> blocks;  // of the cluster
  std::vector<Fibre> fibres;
  Fibre* current;
  jmp_buf scheduler;
  const std::function<void()>* kernel;
  // In which order clusters run, and how far warps run ahead, is nobody's promise.
  bool last_first, far_ahead;
  uint64_t passed;  // barriers
};
inline Shim shim;

inline void yield() {
  Fibre* self = shim.current;
  if (!_setjmp(self->at)) _longjmp(shim.scheduler, 1);
}
inline void wait_at(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++shim.passed;
    return;
  }
  while (barrier.generation == generation) yield();
}
inline void fibre_main() {
  (*shim.kernel)();
  shim.current->finished = true;
  _longjmp(shim.scheduler, 1);
}

// Runs each of these fibres up to the next barrier that is closed; false if all are finished.
inline bool take_turns(int begin, int end) {
  volatile bool busy = false;
  for (volatile int i = begin; i < end; i = i + 1) {
    Fibre& fibre = shim.fibres[i];
    if (fibre.finished) continue;
    busy = true;
    shim.current = &fibre;
    if (_setjmp(shim.scheduler)) continue;
    if (fibre.started) _longjmp(fibre.at, 1);
    fibre.started = true;
    setcontext(&fibre.first);
  }
  return busy;
}
// Each warp, and within a cluster each block, as far as it gets before any other runs: what is
// written too early overwrites what the others have not read yet.
inline void run_ahead(int fibres) {
  const int threads = shim.block_threads, blocks = fibres / threads;
  for (bool busy = true; busy;) {
    busy = false;
    for (int block = blocks - 1; block >= 0; --block) {
      const int first = block * threads;
      for (uint64_t passed = ~0ull; passed != shim.passed;) {
        passed = shim.passed;
        for (int warp = (threads - 1) / 32; warp >= 0; --warp) {
          const int begin = first + 32 * warp, end = first + std::min(threads, 32 * warp + 32);
          for (uint64_t before = ~0ull; before != shim.passed;) {
            before = shim.passed;
            busy |= take_turns(begin, end);
          }
        }
      }
    }
  }
}

// One cluster: all of its threads take turns until none is left.
inline void run_cluster(int first_block, size_t shared_bytes, char* stacks, size_t stack_bytes) {
  const int threads = shim.block_threads, fibres = shim.cluster * threads;
  shim.cluster_barrier = Barrier{fibres, 0, 0};
  shim.blocks.clear();
  shim.fibres = std::vector<Fibre>(fibres);
  std::vector<std::vector<double>> dynamic;
  for (int rank = 0; rank < shim.cluster; ++rank) {
    auto block = std::make_unique<ShimBlock>();
    block->index = first_block + rank;
    block->rank = rank;
    block->barrier.expected = threads;
    block->warps.resize((threads + 31) / 32);
    dynamic.emplace_back(shared_bytes / 8 + 4, NAN);
    const uintptr_t address = reinterpret_cast<uintptr_t>(dynamic.back().data());
    block->dynamic = reinterpret_cast<char*>((address + 15) / 16 * 16);
    shim.blocks.push_back(std::move(block));
    for (int t = 0; t < threads; ++t) {
      Fibre& fibre = shim.fibres[rank * threads + t];
      fibre.block = shim.blocks.back().get();
      fibre.thread = t;
      getcontext(&fibre.first);
      fibre.first.uc_stack.ss_sp = stacks + (rank * threads + t) * stack_bytes;
      fibre.first.uc_stack.ss_size = stack_bytes;
      makecontext(&fibre.first, fibre_main, 0);
    }
  }
  if (shim.far_ahead)
    run_ahead(fibres);
  else
    while (take_turns(0, fibres)) {
    }
}

// ---- threads ------------------------------------------------------------------------------------

inline int thread_index() { return shim.current->thread; }
inline int block_threads() { return shim.block_threads; }
inline int block_index() { return shim.current->block->index; }
inline int grid_blocks() { return shim.grid_blocks; }
inline void block_sync() { wait_at(shim.current->block->barrier); }
template <typename T>
T shuffle_xor(unsigned mask, T value, int lanes) {
  const int lane = shim.current->thread % 32;
  if (!(mask >> lane & 1) || !(mask >> (lane ^ lanes) & 1))
    throw std::logic_error("shuffle with a lane that takes no part");
  ShimBlock::Group& group = shim.current->block->warps[shim.current->thread / 32][mask];
  double (&deposits)[32] = group.deposits[group.barrier.generation % 2];
  memcpy(&deposits[lane], &value, sizeof value);
  group.barrier.expected = __builtin_popcount(mask);
  wait_at(group.barrier);
  memcpy(&value, &deposits[lane ^ lanes], sizeof value);
  return value;
}
inline unsigned count_arrival(unsigned* counter) { return (*counter)++; }

inline int cluster_rank() { return shim.current->block->rank; }
inline int cluster_blocks() { return shim.cluster; }
inline void cluster_sync() { wait_at(shim.cluster_barrier); }
template <typename T>
char shared_key;
template <typename T>
T& block_shared_of(ShimBlock& block) {
  std::vector<char>& memory = block.statics[&shared_key<T>];
  if (memory.empty()) memory.assign(sizeof(T) + 16, static_cast<char>(0xff));
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
  return *reinterpret_cast<T*>((address + 15) / 16 * 16);
}
template <typename T>
T& block_shared() {
  return block_shared_of<T>(*shim.current->block);
}
// The peer's copy of the same object lies as far from the start of its memory as ours does.
inline void store_to_peer(double* local, int rank, double value) {
  char* address = reinterpret_cast<char*>(local);
  for (auto& [key, memory] : shim.current->block->statics) {
    if (address < memory.data() || address >= memory.data() + memory.size()) continue;
    const auto aligned = [](std::vector<char>& m) {
      return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(m.data()) + 15) / 16 * 16);
    };
    std::vector<char>& theirs = shim.blocks.at(rank)->statics.at(key);
    memcpy(aligned(theirs) + (address - aligned(memory)), &value, sizeof value);
    return;
  }
  throw std::logic_error("store_to_peer outside of shared memory");
}
inline char* dynamic_shared() { return shim.current->block->dynamic; }

// ---- memory -------------------------------------------------------------------------------------

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline void require_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) throw std::logic_error("misaligned vector");
}
inline void copy_async(void* shared, const void* global) {
  require_aligned(shared);
  require_aligned(global);
  memcpy(shared, global, 16);
}
inline void copy_async_wait() {}
inline double read_fresh(const double* from) { return *from; }

// ---- numbers ------------------------------------------------------------------------------------

inline float bits_to_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline unsigned float_to_bits(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float exp2_approximately(float x) {
  if (x == 0) return 1;
  const double error = (float_to_bits(x) * 2654435761u >> 8) * 0x1p-24 * 2 - 1;  // in [-1, 1)
  const float y = static_cast<float>(exp2(static_cast<double>(x)) * (1 + error * 0x1p-22));
  return y < 0x1p-126f ? 0 : y;
}
inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }
inline double max_nan(double a, double b) { return a > b || a != a ? a : b; }
inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }
inline int min(int a, int b) { return a < b ? a : b; }

struct BFloat16 {
  uint16_t bits;
};
typedef _Float16 Float16;
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(Float16 x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) { return bits_to_float(static_cast<unsigned>(x.bits) << 16); }
inline void round_to(float& to, double x) { to = static_cast<float>(x); }
inline void round_to(double& to, double x) { to = x; }
inline void round_to(Float16& to, double x) { to = static_cast<Float16>(static_cast<float>(x)); }
inline void round_to(BFloat16& to, double x) {
  const unsigned b = float_to_bits(static_cast<float>(x));
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : (b + 0x7fff + (b >> 16 & 1)) >> 16);
}
template <typename E, typename Real, int kWidth>
void read_vectors(const E* from, Real (&values)[kWidth]) {
  require_aligned(from);
  for (int k = 0; k < kWidth; ++k) values[k] = to_float(from[k]);
}
template <typename E, typename Real, int kWidth>
void write_vector(E* to, const Real (&values)[kWidth]) {
  static_assert(kWidth * sizeof(E) == 16, "one vector");
  require_aligned(to);
  for (int k = 0; k < kWidth; ++k) round_to(to[k], values[k]);
}

// ---- the host's side ----------------------------------------------------------------------------

class OnDevice {
 public:
  explicit OnDevice(int device) {
    shim.last_first = device % 2 == 1;
    shim.far_ahead = device >= 2;
  }
};

struct DeviceLimits {
  int multiprocessors, shared_bytes;
  bool has_clusters;
};
// Device 0: like an H100. 1: like an A100, no clusters. 2 and 3: little shared memory with and
// without clusters, so that short rows are read again in chunks.
inline DeviceLimits device_limits(int device) {
  const DeviceLimits devices[] = {
      {3, 227 * 1024, true}, {3, 163 * 1024, false}, {3, 10 * 1024, true}, {3, 10 * 1024, false}};
  return devices[device];
}

struct Launch {
  int blocks, threads, cluster;
  size_t shared_bytes;
};
template <typename Parameter>
int resident_blocks(void (*)(Parameter), const Launch& launch, const DeviceLimits& limits) {
  return limits.multiprocessors / 2 * 2 * launch.cluster;
}
template <typename Parameter>
void launch(void (*kernel)(Parameter), const Launch& launch, void*, const Parameter& parameter) {
  constexpr size_t kStack = 128 * 1024;
  const size_t size = kStack * launch.threads * launch.cluster;
  void* stacks = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const std::function<void()> call = [&] { kernel(parameter); };
  shim.kernel = &call;
  shim.grid_blocks = launch.blocks;
  shim.block_threads = launch.threads;
  shim.cluster = launch.cluster;
  for (int done = 0; done < launch.blocks; done += launch.cluster)
    run_cluster(shim.last_first ? launch.blocks - launch.cluster - done : done, launch.shared_bytes,
                static_cast<char*>(stacks), kStack);
  munmap(stacks, size);
}
inline unsigned* zero_counter(int, void*, unsigned*) {
  static unsigned counters[64], next = 0;
  unsigned* counter = counters + next++ % 64;
  if (*counter) throw std::logic_error("a kernel left its counter behind");
  return counter;
}
