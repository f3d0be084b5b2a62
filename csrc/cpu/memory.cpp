#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

typedef KdMemory::Block Block;

constexpr size_t kHuge = size_t{1} << 21;
// Two blocks: those of a student with two heads, or of two students in turn.
constexpr int kKept = 2;

// Only ever tried: in the child of a fork nobody may be left to release it. Whoever does not get it
// does without what is kept.
std::mutex mutex;
typedef std::unique_lock<std::mutex> Lock;
Block kept[kKept];  // the last one freed first; without data: none

#if defined(__linux__)
Block map(size_t capacity) {
  // One huge page more than needed, so that a part of it starts on one.
  void* mapped =
      mmap(nullptr, capacity + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (kHuge - reinterpret_cast<uintptr_t>(begin) % kHuge) % kHuge;
  if (before) munmap(begin, before);
  munmap(begin + before + capacity, kHuge - before);
  madvise(begin + before, capacity, MADV_HUGEPAGE);
  return {begin + before, capacity};
}
void unmap(const Block& block) { munmap(block.data, block.capacity); }
// The pages stay until the system is short of memory, or they are written to.
void lend(const Block& block) { madvise(block.data, block.capacity, MADV_FREE); }
#else
Block map(size_t capacity) {
  void* data = std::aligned_alloc(kHuge, capacity);
  if (!data) throw std::bad_alloc();
  return {data, capacity};
}
void unmap(const Block& block) { std::free(block.data); }
void lend(const Block&) {}
#endif

// A kept block that is large enough and at most twice as large.
Block take(size_t capacity) {
  const Lock lock(mutex, std::try_to_lock);
  if (!lock) return {};
  for (Block& block : kept) {
    if (!block.data || block.capacity < capacity || block.capacity / 2 > capacity) continue;
    const Block taken = block;
    block = {};
    return taken;
  }
  return {};
}

}  // namespace

KdMemory::KdMemory(size_t bytes) : block_{}, bytes_(bytes) {
  const size_t capacity = (bytes + kHuge - 1) / kHuge * kHuge;
  block_ = take(capacity);
  if (!block_.data) block_ = map(capacity);
}

KdMemory::~KdMemory() {
  lend(block_);
  Block last = block_;
  {
    const Lock lock(mutex, std::try_to_lock);
    for (Block& block : kept) {
      if (!lock) break;
      const Block next = block;
      block = last;
      last = next;
      if (!last.data) return;
    }
  }
  unmap(last);
}

size_t kd_release_memory() {
  const Lock lock(mutex, std::try_to_lock);
  size_t bytes = 0;
  if (!lock) return bytes;
  for (Block& block : kept) {
    if (!block.data) continue;
    bytes += block.capacity;
    unmap(block);
    block = {};
  }
  return bytes;
}
