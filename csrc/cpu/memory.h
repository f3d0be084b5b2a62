// Memory for large gradients. A training step frees its gradient before it asks for the next one,
// and to map fresh pages takes longer than to compute what goes into them: a freed block is kept
// for the next request. The system may take its pages at any time that it needs them.
#pragma once
#include <stddef.h>

// At least so many bytes, starting on a huge page. Throws std::bad_alloc.
class KdMemory {
 public:
  explicit KdMemory(size_t bytes);
  ~KdMemory();
  KdMemory(const KdMemory&) = delete;
  KdMemory& operator=(const KdMemory&) = delete;

  void* data() const { return block_.data; }
  size_t bytes() const { return bytes_; }

  struct Block {
    void* data;
    size_t capacity;
  };

 private:
  Block block_;
  size_t bytes_;
};

// Gives back what is kept; returns how many bytes that was.
size_t kd_release_memory();
