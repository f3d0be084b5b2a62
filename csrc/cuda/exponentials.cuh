// e^(d/T) for d <= 0, in float and in double.
#pragma once
#include <math.h>

#include "machine.cuh"

namespace {

constexpr double kLog2E = 1.4426950408889634074;

// e^(d/T) for d <= 0. The scale log2(e)/T is in two parts, as d may be -100 and more, and the
// product with a rounded scale would be off by 100 roundings.
template <bool kFast>
struct FloatExponent {
  float high, low, least;  // least: below it the exponential is 0

  KD_DEVICE explicit FloatExponent(double inverse_t) {
    const double scale = kLog2E * inverse_t;
    high = static_cast<float>(scale);
    low = static_cast<float>(scale - high);
    least = static_cast<float>((kFast ? -150 : -127) / scale);
  }
  KD_DEVICE float operator()(float d) const {
    d = max_nan(d, least);
    return kFast ? by_special_function(d) : by_polynomial(d);
  }
  // On the FMA units, to half a unit of the last place: the polynomial of csrc/cpu/vectors.inl.
  KD_DEVICE float by_polynomial(float d) const {
    constexpr float kRound = 12582912.0f + 127.0f;  // adding it rounds, and biases the exponent
    const float biased = multiply_add(d, high, kRound);
    float f = multiply_add(d, high, -(biased - kRound));
    f = multiply_add(d, low, f);
    float p = 0.00015594677f;
    p = multiply_add(p, f, 0.00134066438f);
    p = multiply_add(p, f, 0.00961769297f);
    p = multiply_add(p, f, 0.05550310551f);
    p = multiply_add(p, f, 0.24022652783f);
    p = multiply_add(p, f, 0.69314721497f);
    p = multiply_add(p, f, 1.0f);
    return p * bits_to_float(float_to_bits(biased) << 23);
  }
  // On the special-function units, to two units of the last place, in half the instructions; the
  // rounding of the argument is put back afterwards.
  KD_DEVICE float by_special_function(float d) const {
    const float x = d * high;
    float lost = multiply_add(d, high, -x);
    lost = multiply_add(d, low, lost);
    const float y = exp2_approximately(x);
    return multiply_add(y, lost * 0.69314718f, y);
  }
};
struct DoubleExponent {
  double inverse_t;
  KD_DEVICE explicit DoubleExponent(double inverse) : inverse_t(inverse) {}
  KD_DEVICE double operator()(double d) const { return exp(d * inverse_t); }
};

}  // namespace
