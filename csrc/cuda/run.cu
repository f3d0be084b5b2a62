#include "run.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "counts.cuh"
#include "scale.cuh"

namespace {

// Up to here every block counts the labels for itself: 128 kB out of the L2 cache, while its first
// row is on the way. Beyond, one launch more counts them for all.
constexpr int64_t kRowsCountedByEachBlock = 16384;
// What a block holds of a row: of 512 threads two fit the registers of a multiprocessor, and their
// rows its shared memory, so that one waits for its row while the other computes.
constexpr int kSliceBytes = 64 * 1024;
// Shared memory of a block besides the row: teams.cuh's, and 1 KiB that the driver keeps.
constexpr int kOtherShared = 6 * 1024;

const KdRowsKernels& kernels_for(const KdCudaProblem& p, bool fast) {
  const bool same = p.student_dtype == p.teacher_dtype;
  switch (p.student_dtype) {
    case kBFloat16:
      return kd_rows_kernels_bf16(same, fast);
    case kFloat16:
      return kd_rows_kernels_f16(same, fast);
    case kFloat64:
      return kd_rows_kernels_f64(same, fast);
    default:
      return kd_rows_kernels_f32(same, fast);
  }
}

int64_t up_to_power_of_2(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Vectors of a row that starts where it is worst aligned.
int64_t vectors_of(const KdCudaProblem& p) {
  const int width = p.student_dtype == kFloat64 ? 8 : p.student_dtype == kFloat32 ? 4 : 2;
  return (p.classes * width + 15) / 16 + 1;
}

struct Plan {
  KdTeam team;
  Launch launch;
  int chunk, teams_per_block;
};

// A block or a cluster per row, each block with `slice` vectors of which it holds `chunk`.
Plan block_plan(KdTeam team, int cluster, int64_t slice, int64_t chunk, int vector_bytes) {
  // Eight vectors per thread: enough independent copies in flight, and a warp's share of barriers.
  const int threads = static_cast<int>(std::min<int64_t>(
      kMaxThreads, std::max<int64_t>(64, up_to_power_of_2((std::min(slice, chunk) + 7) / 8))));
  return {team,
          {0, threads, cluster, static_cast<size_t>(chunk * vector_bytes)},
          static_cast<int>(chunk),
          1};
}

// Who shares a row, by its length.
//   vectors <= 16      8 lanes: 10 to 100 classes leave most of a warp idle, and rows are many
//   vectors <= 128     a warp: no barrier; 1,000 classes of 16 bits, 500 of 32
//   slice <= 64 KiB    a block
//   longer             clusters of 2, 4, 8, 16 blocks with 64 KiB each, where the device has them
//   longer still       what fits, read again in chunks for each sweep
Plan plan_for(const KdCudaProblem& p, const KdRowsKernels& kernels, const DeviceLimits& limits) {
  const int bytes = kernels.vector_bytes;
  const int64_t vectors = vectors_of(p);
  const int most = limits.shared_bytes - kOtherShared;
  if (vectors <= 16)
    return {kLanes8,
            {0, 128, 1, static_cast<size_t>(16 * vectors * bytes)},
            static_cast<int>(vectors),
            16};
  if (vectors <= 128)
    return {kLanes32,
            {0, 128, 1, static_cast<size_t>(4 * vectors * bytes)},
            static_cast<int>(vectors),
            4};
  const int64_t slice_limit = std::min(kSliceBytes, most) / bytes;
  if (vectors <= slice_limit) return block_plan(kOneBlock, 1, vectors, vectors, bytes);
  if (limits.has_clusters)
    for (int cluster = 2; cluster <= kMaxCluster; cluster *= 2) {
      const int64_t slice = (vectors + cluster - 1) / cluster;
      // The largest cluster takes what it can hold, and chunks of what it cannot.
      const int64_t limit = cluster < kMaxCluster ? slice_limit : most / bytes;
      if (slice > limit && cluster < kMaxCluster) continue;
      const Plan plan = block_plan(kBlockCluster, cluster, slice, std::min(slice, limit), bytes);
      if (resident_blocks(kernels.by_team[kBlockCluster], plan.launch, limits) > 0) return plan;
    }
  if (vectors * bytes <= most) return block_plan(kOneBlock, 1, vectors, vectors, bytes);
  return block_plan(kOneBlock, 1, vectors, slice_limit, bytes);
}

// Plans are kept: to ask the driver takes longer than to launch.
Plan known_plan(const KdCudaProblem& p, const KdRowsKernels& kernels, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const KdRowsKernels*, int64_t>, Plan> plans;
  const auto key = std::make_tuple(device, &kernels, p.classes);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  const DeviceLimits limits = device_limits(device);
  Plan plan = plan_for(p, kernels, limits);
  plan.launch.blocks = resident_blocks(kernels.by_team[plan.team], plan.launch, limits);
  if (plan.launch.blocks == 0)
    throw std::runtime_error("CUDA: no block of the kernel fits this GPU");
  if (plans.size() >= 4096) plans.clear();
  return plans[key] = plan;
}

int power_of(double temperature) {
  for (int power = 1; power <= 4; ++power)
    if (temperature == power) return power;
  return 0;
}

bool must_be_counted(const KdCudaProblem& p) {
  if (p.weight) return true;  // whose sum and maximum are wanted as well
  const bool divides = p.labels && p.out.reduction == kMean && !p.out.num_items;
  return divides && p.rows > kRowsCountedByEachBlock;
}

void count(KdCudaProblem& p, int device, void* stream, double* memory, unsigned* counter) {
  KdCounting c = {p, reinterpret_cast<KdCounts*>(memory), memory + 4, nullptr};
  const int64_t work = std::max(p.rows, p.weight ? p.classes : 0);
  const int blocks = static_cast<int>(std::min<int64_t>(kMaxCountBlocks, work / 4096 + 1));
  c.arrivals = zero_counter(device, stream, counter);
  launch(counts_kernel, {blocks, kMaxThreads, 1, 0}, stream, c);
  p.counts = c.counts;
}

}  // namespace

void kd_cuda_run(KdCudaProblem& p, int device, void* stream, void* workspace) {
  const OnDevice current(device);
  if (p.classes > INT32_MAX / 2) throw std::runtime_error("CUDA: more than 2^30 classes");
  if (!p.want_soft) {  // the teacher is not looked at: nor is it read
    p.teacher = p.student;
    p.teacher_rows = p.student_rows;
    p.teacher_dtype = p.student_dtype;
  }
  // To two units of the last place an exponential is good enough for a loss times T^2 <= 4.
  const bool sixteen_bits = p.student_dtype == kBFloat16 || p.student_dtype == kFloat16;
  const bool fast = sixteen_bits && p.temperature <= 2;
  const KdRowsKernels& kernels = kernels_for(p, fast);
  Plan plan = known_plan(p, kernels, device);

  p.partials = static_cast<double*>(workspace);
  double* counts = p.partials + 2 * kMaxBlocks;
  unsigned* counters = reinterpret_cast<unsigned*>(counts + 4 * (kMaxCountBlocks + 1));
  if (must_be_counted(p)) count(p, device, stream, counts, counters);
  p.arrivals = zero_counter(device, stream, counters + 2);
  p.chunk = plan.chunk;
  p.power = power_of(p.temperature);
  const int64_t needed =
      (p.rows + plan.teams_per_block - 1) / plan.teams_per_block * plan.launch.cluster;
  const int64_t most = kMaxBlocks / plan.launch.cluster * plan.launch.cluster;
  // No rows: one team, for the sums of nothing.
  plan.launch.blocks = static_cast<int>(std::max<int64_t>(
      plan.launch.cluster, std::min<int64_t>({needed, most, plan.launch.blocks})));
  launch(kernels.by_team[plan.team], plan.launch, stream, p);
}

void kd_cuda_scale(const KdScaling& s, int device, void* stream) {
  if (s.rows * s.classes == 0) return;
  const OnDevice current(device);
  const int64_t pieces = s.rows * ((s.classes + kPiece - 1) / kPiece);
  const Launch shape = {static_cast<int>(std::min<int64_t>(pieces, 2048)), kScaleThreads, 1, 0};
  switch (s.dtype) {
    case kBFloat16:
      return launch(scale_kernel<BFloat16>, shape, stream, s);
    case kFloat16:
      return launch(scale_kernel<Float16>, shape, stream, s);
    case kFloat64:
      return launch(scale_kernel<double>, shape, stream, s);
    default:
      return launch(scale_kernel<float>, shape, stream, s);
  }
}

const char* kd_cuda_why_not(int device) {
  try {
    const OnDevice current(device);
    return resident_blocks(scale_kernel<float>, {1, kScaleThreads, 1, 0}, device_limits(device)) > 0
               ? ""
               : "no kernel fits";
  } catch (const std::runtime_error& error) {
    static thread_local std::string reason;
    reason = error.what();
    return reason.c_str();
  }
}
