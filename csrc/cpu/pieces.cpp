#include "pieces.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"

namespace {

struct Deleter {
  void operator()(char* memory) const { std::free(memory); }
};

// Kept from call to call: fresh pages would have to be faulted in each time. What only very large
// batches need is given back.
constexpr int64_t kKeptBytes = int64_t{1} << 26;

struct Scratch {
  std::unique_ptr<char, Deleter> memory;
  int64_t size = 0;

  char* of(int64_t bytes) {
    if (bytes > size) {
      size = 0;
      const size_t rounded = static_cast<size_t>((bytes + 63) / 64 * 64);
      memory.reset(static_cast<char*>(std::aligned_alloc(64, rounded)));
      if (!memory) throw std::bad_alloc();
      size = static_cast<int64_t>(rounded);
    }
    return memory.get();
  }

  void trim() {
    if (size <= kKeptBytes) return;
    memory.reset();
    size = 0;
  }
};

thread_local Scratch scratch_of_this_thread;

struct Job {
  KdPieceFn fn;
  const void* work;
  int64_t total, piece, scratch_bytes;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
};

void take_pieces(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  try {
    char* const scratch = scratch_of_this_thread.of(job.scratch_bytes);
    for (;;) {
      const int64_t begin = job.next.fetch_add(job.piece);
      if (begin >= job.total) break;
      job.fn(job.work, begin, std::min(begin + job.piece, job.total), scratch);
    }
    scratch_of_this_thread.trim();
  } catch (const std::bad_alloc&) {
    job.out_of_memory = true;
  }
}

}  // namespace

void kd_in_pieces(int64_t total, int64_t piece, int threads, int64_t scratch_bytes, KdPieceFn fn,
                  const void* work) {
  Job job;
  job.fn = fn, job.work = work;
  job.total = total, job.scratch_bytes = scratch_bytes;
  if (threads > 1 && total > 1 && kd_can_parallel()) {
    job.piece = std::min((total + threads - 1) / threads, std::max<int64_t>(1, piece));
    kd_parallel(static_cast<int>(std::min<int64_t>(threads, total)), take_pieces, &job);
  } else {
    job.piece = total;
    take_pieces(&job);
  }
  if (job.out_of_memory) throw std::bad_alloc();
}
