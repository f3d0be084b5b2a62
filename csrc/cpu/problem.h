// What one call of the CPU kernel is asked to do. Plain C types only: the per-instruction-set
// units include this and must not instantiate code that the linker could share between sets.
#pragma once
#include <stdint.h>

// Inlined always: a copy left to the linker could carry one instruction set into another's unit.
#define KD_INLINE inline __attribute__((always_inline))

enum KdDtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Row i of a matrix starts (i / inner) * outer_stride + (i % inner) * inner_stride elements in;
// the classes of a row are neighbours. Two levels cover logits[:, :-1] without a copy.
struct KdRows {
  int64_t inner, outer_stride, inner_stride;
  KD_INLINE int64_t start(int64_t i) const {
    return (i / inner) * outer_stride + (i % inner) * inner_stride;
  }
};

struct KdProblem {
  const void* student;
  const void* teacher;
  void* grad;                            // null: loss only. May be the student itself.
  const void* labels;                    // null: every row active, no cross entropy
  const double* weight;                  // null: ones
  KdDtype student_dtype, teacher_dtype;  // the gradient has the student's
  KdRows student_rows, teacher_rows, grad_rows;
  bool labels_are_int64, distill_ignored, want_soft, want_hard;
  int64_t rows, classes, ignore_index;
  double temperature, alpha, label_smoothing;

  // Filled in by kd_run before the rows are visited.
  double weight_sum;              // sum of the class weights, C without any
  double soft_scale, hard_scale;  // of the gradient of a row's KL / cross entropy
  bool in_double;                 // one of the inputs is float64
  double* soft;                   // [rows] T^2 KL
  double* hard;                   // [rows] cross entropy

  KD_INLINE int64_t label(int64_t row) const {
    return labels_are_int64 ? static_cast<const int64_t*>(labels)[row]
                            : static_cast<const int32_t*>(labels)[row];
  }
  KD_INLINE bool hard_active(int64_t row) const { return labels && label(row) != ignore_index; }
  KD_INLINE bool soft_active(int64_t row) const {
    return !labels || distill_ignored || hard_active(row);
  }
};

// Elements handled between two looks at the running maximum: both rows' blocks stay in L1.
constexpr int64_t kBlock = 2048;

// Doubles that one thread needs for kd_rows_*: three rows of exponentials (blocks, where no
// gradient is asked for), each rounded up to whole cache lines, and two maxima per block.
KD_INLINE int64_t kd_scratch_row(const KdProblem& p) {
  return ((p.grad && p.classes > kBlock ? p.classes : kBlock) + 15) / 16 * 16;
}
KD_INLINE int64_t kd_scratch_size(const KdProblem& p) {
  return 3 * kd_scratch_row(p) + 2 * (p.classes / kBlock + 1);
}

// Rows [begin, end) with one instruction set; `scratch` is 64-byte aligned.
typedef void (*KdRowsFn)(const KdProblem& p, int64_t begin, int64_t end, char* scratch);
extern "C" void kd_rows_portable(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx2(const KdProblem&, int64_t, int64_t, char*);
extern "C" void kd_rows_avx512(const KdProblem&, int64_t, int64_t, char*);
