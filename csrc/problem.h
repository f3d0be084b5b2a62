// What one call of a compiled kernel is asked to do, on whatever device. Plain C types only: the
// CPU's per-instruction-set units include this and must not instantiate code that the linker could
// share between sets.
#pragma once
#include <stdint.h>

// Inlined always: a copy left to the linker could carry one instruction set into another's unit.
#if defined(__CUDACC__)
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif

enum KdDtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum KdReduction : int { kMean = 0, kSum = 1, kNone = 2 };

// Row i of a matrix starts (i / inner) * outer_stride + (i % inner) * inner_stride elements in;
// the classes of a row are neighbours. Two levels cover logits[:, :-1] without a copy.
struct KdRows {
  int64_t inner, outer_stride, inner_stride;
  KD_INLINE int64_t start(int64_t i) const {
    if (inner == 1) return i * outer_stride;  // a division is dear on a GPU
    return (i / inner) * outer_stride + (i % inner) * inner_stride;
  }
};

struct KdLoss {
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
  double soft_factor;  // of the soft term: T^2, or 1
  double z_loss;       // of the squared logarithm of the cross entropy's sum
  double logit_shift;  // what has been taken off the student's logits

  KD_INLINE int64_t label(int64_t row) const {
    return labels_are_int64 ? static_cast<const int64_t*>(labels)[row]
                            : static_cast<const int32_t*>(labels)[row];
  }
  KD_INLINE bool hard_active(int64_t row) const { return labels && label(row) != ignore_index; }
  KD_INLINE bool soft_active(int64_t row) const {
    return !labels || distill_ignored || hard_active(row);
  }
};

// What the whole batch decides for each of its rows.
struct KdScales {
  double soft_scale, hard_scale;  // of the gradient of a row's KL / cross entropy
  double weight_sum;              // sum of the class weights, C without any
};

// Where the results go.
struct KdOutput {
  KdReduction reduction;
  bool in_float64;           // of the three below; float32 otherwise
  void *loss, *soft, *hard;  // a scalar, or [rows] for kNone; the terms may be null
  // Null, or what the means of the soft and of the hard term divide by, as the device's numbers; by
  // the rows of the problem otherwise.
  const double* num_items;
};
