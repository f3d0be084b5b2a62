// The part of DIST that lies across the batch: every class compared over the rows. All of it is in
// double: the gradient of a column is divided by its deviation, which may be next to nothing.
#pragma once
#include "../problem.h"

constexpr int64_t kMaxWidth = 512;

struct KdColumns {
  const void *student, *teacher;
  KdDtype student_dtype, teacher_dtype;
  KdRows student_rows, teacher_rows;
  int64_t rows, classes;
  double temperature, teacher_temperature;
  const bool* active;  // [rows]
  double scale;        // of the gradient
  void* grad;          // [rows, classes], or null
  bool in_float64;     // the gradient; float32 otherwise

  // Filled in by kd_compare_columns.
  int64_t count, width;               // active rows; classes that are compared at a time
  double *student_log, *teacher_log;  // [rows] log of the sum of e^(v / T)
  double* distance;                   // [classes] 1 - Pearson's correlation
};

// One after the other; each in pieces, of rows, tiles of columns, and rows.
enum KdColumnsStep : int { kNormalise = 0, kCompare = 1, kFinish = 2 };

// Doubles that one thread needs: a tile of p and of q, and a few numbers per column.
KD_INLINE int64_t kd_columns_scratch(const KdColumns& c) { return (2 * c.count + 5) * c.width; }

// Pieces [begin, end) of a step with one instruction set; `scratch` is 64-byte aligned.
typedef void (*KdColumnsFn)(const KdColumns& c, KdColumnsStep step, int64_t begin, int64_t end,
                            char* scratch);
extern "C" void kd_columns_portable(const KdColumns&, KdColumnsStep, int64_t, int64_t, char*);
extern "C" void kd_columns_avx2(const KdColumns&, KdColumnsStep, int64_t, int64_t, char*);
extern "C" void kd_columns_avx512(const KdColumns&, KdColumnsStep, int64_t, int64_t, char*);

// The mean over the classes, 0 where no row is active; and the gradient, if one is asked for.
double kd_compare_columns(KdColumns& c, int threads);
