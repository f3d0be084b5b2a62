// The columns of a batch compared, on buffers of exactly the right size. What the values are is
// tested from Python; here they must be sound: a gradient that sums to nothing in each row, and
// none in the row that is left out, which holds NaN.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/columns.h"

inline bool check_columns(int64_t rows, int64_t classes, KdDtype teacher, std::mt19937& random) {
  const int64_t size = rows * classes, left_out = rows / 2;
  std::vector<float> s(size), t32(size), grad(size, 7.0f);
  std::vector<uint16_t> t16(size);
  std::vector<double> t64(size);
  std::unique_ptr<bool[]> active(new bool[rows]);
  for (int64_t i = 0; i < size; ++i) {
    const bool counts = i / classes != left_out;
    s[i] = counts ? static_cast<float>(random() % 1000) / 200 : NAN;
    t32[i] = counts ? static_cast<float>(random() % 1000) / 200 : NAN;
    t64[i] = t32[i];
    t16[i] = static_cast<uint16_t>(counts ? 0x3c00 + random() % 0x400 : 0x7fff);
  }
  for (int64_t i = 0; i < rows; ++i) active[i] = i != left_out;
  KdColumns c = {};
  c.student = s.data();
  c.teacher = teacher == kFloat32   ? static_cast<const void*>(t32.data())
              : teacher == kFloat64 ? static_cast<const void*>(t64.data())
                                    : t16.data();
  c.student_dtype = kFloat32, c.teacher_dtype = teacher;
  c.student_rows = c.teacher_rows = {1, classes, 0};
  c.rows = rows, c.classes = classes;
  c.temperature = 2, c.teacher_temperature = 1, c.scale = 3;
  c.active = active.get();
  const double without = kd_compare_columns(c, 2);
  c.grad = grad.data();
  const double value = kd_compare_columns(c, 2);
  bool good = value == without && value >= 0 && value <= 2 + 1e-12;
  double all = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double total = 0, sizes = 1e-30;
    for (int64_t k = 0; k < classes; ++k)
      total += grad[i * classes + k], sizes += std::fabs(grad[i * classes + k]);
    good &= active[i] ? std::fabs(total) <= 1e-5 * sizes : sizes <= 1e-30;
    all += sizes;
  }
  good &= all > 1e-20 || classes == 1 || rows < 3;
  if (!good)
    std::printf("FAILED columns of %ld rows, %ld classes, dtype %d: %g\n", (long)rows,
                (long)classes, teacher, value);
  return good;
}
