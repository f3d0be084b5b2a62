// Single numbers of a type that is known at run time only, as double.
#pragma once
#include "machine.cuh"
#include "problem.cuh"

namespace {

KD_DEVICE double value_at(const void* values, KdDtype dtype, int64_t i) {
  switch (dtype) {
    case kFloat64:
      return static_cast<const double*>(values)[i];
    case kFloat32:
      return static_cast<const float*>(values)[i];
    case kBFloat16:
      return to_float(static_cast<const BFloat16*>(values)[i]);
    default:
      return to_float(static_cast<const Float16*>(values)[i]);
  }
}

// Numbers that lie side by side.
struct Row {
  const void* values;
  KdDtype dtype;

  KD_DEVICE double operator[](int64_t i) const { return value_at(values, dtype, i); }
};
KD_DEVICE Row row_at(const void* values, KdDtype dtype, int64_t start) {
  const int width = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  return {static_cast<const char*>(values) + start * width, dtype};
}

KD_DEVICE void put_value(void* values, KdDtype dtype, int64_t i, double value) {
  switch (dtype) {
    case kFloat64:
      return round_to(static_cast<double*>(values)[i], value);
    case kFloat32:
      return round_to(static_cast<float*>(values)[i], value);
    case kBFloat16:
      return round_to(static_cast<BFloat16*>(values)[i], value);
    default:
      return round_to(static_cast<Float16*>(values)[i], value);
  }
}

}  // namespace
