// Work that threads take in pieces, each with memory of its own.
#pragma once
#include <stdint.h>

// Items [begin, end) of what `work` describes; `scratch` is 64-byte aligned.
typedef void (*KdPieceFn)(const void* work, int64_t begin, int64_t end, char* scratch);

// Calls fn for all of [0, total) on up to `threads` threads and waits for them. The pieces are
// handed out as they are asked for, so that a delayed thread holds up little: what is computed must
// not depend on who computes it. Throws std::bad_alloc.
void kd_in_pieces(int64_t total, int64_t piece, int threads, int64_t scratch_bytes, KdPieceFn fn,
                  const void* work);
