// What the kernels use of a GPU, and how they are launched: the one seam between their logic and
// the machine. The tests put a header of the same names in its place that runs on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#define KD_DEVICE __device__ __forceinline__
#define KD_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define KD_PARAMETER const __grid_constant__

typedef __nv_bfloat16 BFloat16;
typedef __half Float16;

// ---- threads ------------------------------------------------------------------------------------

KD_DEVICE int thread_index() { return threadIdx.x; }
KD_DEVICE int block_threads() { return blockDim.x; }
KD_DEVICE int block_index() { return blockIdx.x; }
KD_DEVICE int grid_blocks() { return gridDim.x; }
KD_DEVICE void block_sync() { __syncthreads(); }
template <typename T>
KD_DEVICE T shuffle_xor(unsigned mask, T value, int lanes) {
  return __shfl_xor_sync(mask, value, lanes);
}
// Blocks of this launch that came here before.
KD_DEVICE unsigned count_arrival(unsigned* counter) {
  __threadfence();  // what this block has written is seen by whoever comes after
  const unsigned before = atomicAdd(counter, 1u);
  __threadfence();
  return before;
}

// ---- thread-block clusters (sm_90) --------------------------------------------------------------

KD_DEVICE int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
KD_DEVICE int cluster_blocks() {
  int blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return blocks;
}
KD_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Writes where `local`, of this block's shared memory, lies in that of the block of this rank.
KD_DEVICE void store_to_peer(double* local, int rank, double value) {
#if __CUDA_ARCH__ >= 900
  uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(local)), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(value) : "memory");
#endif
}

// ---- memory -------------------------------------------------------------------------------------

// The block's own object of this type.
template <typename T>
KD_DEVICE T& block_shared() {
  __shared__ T memory;
  return memory;
}
KD_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
// 16 aligned bytes from global to shared memory, past the registers, without waiting.
KD_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// The copies of this thread have arrived, and it may read them.
KD_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- numbers ------------------------------------------------------------------------------------

// 2^x to 2 units of the last place; below the normal numbers 0.
KD_DEVICE float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// NaN if either is.
KD_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
KD_DEVICE double max_nan(double a, double b) { return a > b || a != a ? a : b; }
KD_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
KD_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
KD_DEVICE float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
KD_DEVICE unsigned float_to_bits(float x) { return __float_as_uint(x); }

KD_DEVICE float to_float(float x) { return x; }
KD_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
KD_DEVICE float to_float(Float16 x) { return __half2float(x); }
KD_DEVICE double to_float(double x) { return x; }

KD_DEVICE void round_to(float& to, double x) { to = static_cast<float>(x); }
KD_DEVICE void round_to(double& to, double x) { to = x; }
KD_DEVICE void round_to(BFloat16& to, double x) { to = __float2bfloat16_rn(static_cast<float>(x)); }
KD_DEVICE void round_to(Float16& to, double x) { to = __float2half_rn(static_cast<float>(x)); }

// Vectors, aligned to 16 bytes.
template <typename E, typename Real, int kWidth>
KD_DEVICE void read_vectors(const E* from, Real (&values)[kWidth]) {
  constexpr int kBytes = kWidth * sizeof(E);
  static_assert(kBytes % 16 == 0, "whole vectors only");
  alignas(16) E elements[kWidth];
#pragma unroll
  for (int i = 0; i < kBytes / 16; ++i)
    reinterpret_cast<uint4*>(elements)[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) values[k] = to_float(elements[k]);
}
template <typename E, typename Real, int kWidth>
KD_DEVICE void write_vector(E* to, const Real (&values)[kWidth]) {
  static_assert(kWidth * sizeof(E) == 16, "one vector");
  alignas(16) E elements[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) round_to(elements[k], values[k]);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(elements);
}
// What another block has written in this launch.
KD_DEVICE double read_fresh(const double* from) { return __ldcg(from); }

// ---- the host's side ----------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken off, so that the next call does not report it again
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the one before current again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct DeviceLimits {
  int multiprocessors, shared_bytes;  // shared_bytes: that one block may have
  bool has_clusters;
};

inline DeviceLimits device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int major = 0;
  DeviceLimits limits = {};
  const auto ask = [device](cudaDeviceAttr attribute, int& value) {
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  };
  ask(cudaDevAttrComputeCapabilityMajor, major);
  ask(cudaDevAttrMultiProcessorCount, limits.multiprocessors);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, limits.shared_bytes);
  limits.has_clusters = major >= 9;
  return known[device] = limits;
}

struct Launch {
  int blocks, threads, cluster;
  size_t shared_bytes;
};

template <typename Parameter>
cudaLaunchConfig_t configured(const Launch& launch, cudaLaunchAttribute* attribute,
                              void (*)(Parameter), cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.blocks;
  config.blockDim = launch.threads;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  config.attrs = attribute;
  config.numAttrs = launch.cluster > 1;
  return config;
}

// How many blocks of this launch the current device can hold at a time; 0 if none.
template <typename Parameter>
int resident_blocks(void (*kernel)(Parameter), const Launch& launch, const DeviceLimits& limits) {
  // All there is: the limit is the kernel's, and kept plans of other row lengths rely on it, too.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limits.shared_bytes - static_cast<int>(attributes.sharedSizeBytes)),
        "shared memory");
  if (launch.cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "clusters of more than eight blocks");
  int blocks = 0;
  if (launch.cluster == 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, launch.threads,
                                                        launch.shared_bytes),
          "occupancy");
    return blocks * limits.multiprocessors;
  }
  cudaLaunchAttribute attribute;
  Launch one = launch;
  one.blocks = launch.cluster;
  const cudaLaunchConfig_t config = configured(one, &attribute, kernel, nullptr);
  if (cudaOccupancyMaxActiveClusters(&blocks, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return blocks * launch.cluster;
}

template <typename Parameter>
void launch(void (*kernel)(Parameter), const Launch& launch, void* stream,
            const Parameter& parameter) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config =
      configured(launch, &attribute, kernel, static_cast<cudaStream_t>(stream));
  check(cudaLaunchKernelEx(&config, kernel, parameter), "launch");
}

// Zero when the module is loaded, on each device.
static __device__ unsigned zero_counters[4096];

// A counter that is zero when a kernel starts, and that the kernel leaves at zero. Each stream has
// one, as its launches follow one another. A graph may be replayed on any stream: there, and for
// streams beyond the 4096th, the counter is memory of the call, cleared on the stream.
inline unsigned* zero_counter(int device, void* stream, unsigned* memory_of_the_call) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capturing;
  check(cudaStreamIsCapturing(s, &capturing), "cudaStreamIsCapturing");
  if (capturing == cudaStreamCaptureStatusNone) {
    unsigned long long id = 0;
    check(cudaStreamGetId(s, &id), "cudaStreamGetId");
    static std::mutex mutex;
    static std::map<std::pair<int, unsigned long long>, unsigned*> counters;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = counters.find({device, id});
    if (found != counters.end()) return found->second;
    if (counters.size() < sizeof(zero_counters) / sizeof(unsigned)) {
      void* first = nullptr;
      check(cudaGetSymbolAddress(&first, zero_counters), "the counters of the reductions");
      return counters[{device, id}] = static_cast<unsigned*>(first) + counters.size();
    }
  }
  check(cudaMemsetAsync(memory_of_the_call, 0, sizeof(unsigned), s), "cudaMemsetAsync");
  return memory_of_the_call;
}
