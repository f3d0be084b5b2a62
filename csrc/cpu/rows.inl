// The fused kernel: temperature softmax of both rows, KL divergence and cross entropy, and the
// gradient. Sweep 1 collects the row's statistics and leaves the exponentials in scratch (the
// student's in the gradient row itself where that is of the same type); sweep 2 only rescales them.
// Beside the gradient only a thread's scratch rows are written, which stay in its cache.
//
// This source is compiled once per instruction set by the two-line files beside it. All of it has
// internal linkage, but for the one entry point: an inline function shared by the linker could
// bring AVX code to a machine without AVX.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "problem.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#include "vectors.inl"

#include "sweeps.inl"

// ---- is float32 enough? ------------------------------------------------------------------------

// A float32 exponential is off by up to about this much of itself. The loss multiplies that by T^2,
// and the gradient is a difference of exponentials that may be small: a row that this puts at risk
// is visited again in double. At T <= 4 the loss is never at risk.
constexpr double kEpsilon = 0x1p-24;
constexpr double kLossBound = 2e-6;  // what the package promises, of 1 + loss

// Of the gradient's norm: half of what the package promises, as products are rounded, too.
inline double gradient_bound(KdDtype dtype) { return dtype == kFloat32 ? 1e-6 : 0x1p-13; }

// At most the sum of the squared probabilities, of which the largest is 1 / sum.
inline double squared(double sum) { return 1 / sum; }
// The same for some of them, whose exponentials add up to `others`.
inline double squared(double others, double sum) {
  return (others < 1 ? others * others : others) / (sum * sum);
}

// The errors of the exponentials do not average out over the classes, as equal logits have equal
// ones. The largest is exactly 1, but is rounded when another is added: both sums are off by up to
// kEpsilon of themselves, and so are their logarithms.
template <typename Real>
bool loss_is_exact(const KdProblem& p, const Sums<Real>& sums, double loss) {
  if (sizeof(Real) == 8) return true;
  if (loss == INFINITY && !sums.masked) return false;  // logits near the largest number
  const double error = 2 * kEpsilon * p.temperature * p.temperature;
  return !(error > kLossBound * (1 + loss));  // NaN is as exact as it gets
}

template <typename Real, int P>
bool gradient_is_exact(const KdProblem& p, const Sums<Real>& sums, const Factors& f,
                       const SureEntry& sure, double squares) {
  if (sizeof(Real) == 8) return true;
  const bool hard = P != kNoCrossEntropy, is_sure = sure.index >= 0;
  if (!hard && squares == 0 && sums.cross == 0) return true;  // teacher = student
  double error = 0;
  if (const double scale = f.student * sums.student; scale != 0)
    error += scale * scale *
             (is_sure ? squared(sure.student, sums.student) + squared(sure.teacher, sums.teacher)
                      : squared(sums.student) + squared(sums.teacher));
  if (const double scale = f.hard * sums.hard; hard && scale != 0)
    error += scale * scale * (is_sure ? squared(sure.hard, sums.hard) : squared(sums.hard));
  const double bound = gradient_bound(p.student_dtype);
  return !(error * kEpsilon * kEpsilon > squares * bound * bound);
}

// ---- one row -----------------------------------------------------------------------------------

inline int64_t element_size(KdDtype dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

template <typename Real>
double soft_loss(const KdProblem& p, const Sums<Real>& sums) {
  const double t = p.temperature;
  double kl = sums.cross / (sums.teacher * t) + log(sums.student / sums.teacher);
  if (kl < 0) kl = 0;  // rounding; KL is not negative
  if (sums.masked && kl == kl) kl = INFINITY;
  if (!(sums.student > 0)) kl = NAN;  // every class masked: no distribution
  return t * t * kl;
}

// The cross entropy of a row, and its factors of the gradient.
template <typename Real>
double hard_loss(const KdProblem& p, const Sums<Real>& sums, int64_t label, double at_label,
                 Factors& f) {
  const double w = p.weight ? p.weight[label] : 1.0, epsilon = p.label_smoothing;
  const double smooth = epsilon / (double)p.classes;
  f.smooth = -p.hard_scale * smooth;
  f.smooth_total = p.hard_scale * smooth * p.weight_sum;
  f.label = p.hard_scale * (1 - epsilon) * w;
  f.hard = (f.label + f.smooth_total) / sums.hard;
  const double lse = log(sums.hard), max = reference_of(sums.student_max);
  const double loss = (1 - epsilon) * w * (lse - (at_label - max));
  return epsilon > 0 ? loss + smooth * (p.weight_sum * (lse + max) - sums.smooth) : loss;
}

// Sweep 2 with the entries that cancel put in; false, and in place nothing is lost, if float32 was
// not enough.
template <typename Real, int P>
bool write_gradient(const KdProblem& p, const Sums<Real>& sums, const Factors& f, Real* es,
                    const Scratch<Real>& scratch, char* grad, bool deferred, int64_t label) {
  const SureEntry sure = sure_entry<Real, P>(p, sums, f, es, scratch, label);
  Entry entries[] = {label_entry<Real, P>(p, sums, f, es, scratch, label), sure};
  if (sure.index == entries[0].index) entries[0].index = -1;
  double squares = 0;
  for (const Entry& e : entries) {
    if (e.index < 0) continue;
    // Blanked out of the sweep, which then adds only the smoothing's share.
    es[e.index] = scratch.teacher[e.index] = 0;
    if (P == kOwnExponential) scratch.hard[e.index] = 0;
    const double smooth = f.smooth * (p.weight ? p.weight[e.index] : 1.0);
    squares += e.gradient * e.gradient - smooth * smooth;
  }
  squares += sweep2<Real, P>(p, sums, f, es, scratch, grad, deferred);
  if (!gradient_is_exact<Real, P>(p, sums, f, sure, squares)) return false;
  if (deferred) store_block(es, p.classes, p.student_dtype, grad, 0);
  for (const Entry& e : entries) {
    const Real value = (Real)e.gradient;
    if (e.index >= 0) store_block(&value, 1, p.student_dtype, grad, e.index);
  }
  return true;
}

// What of a row was good enough in float32.
enum Good { kNothing, kLoss, kAll };

// Everything of row i.
template <typename Real, int P>
Good row(const KdProblem& p, int64_t i, const Scratch<Real>& scratch) {
  const int64_t width = element_size(p.student_dtype);
  const char* student = (const char*)p.student + p.student_rows.start(i) * width;
  const char* teacher =
      (const char*)p.teacher + p.teacher_rows.start(i) * element_size(p.teacher_dtype);
  char* grad = p.grad ? (char*)p.grad + p.grad_rows.start(i) * width : nullptr;
  const bool soft = p.soft_active(i), hard = P != kNoCrossEntropy;
  const int64_t label = hard ? p.label(i) : -1;
  const double at_label = hard ? (double)load_one<Real>(student, p.student_dtype, label) : 0;

  // The student's exponentials go where the gradient will be, if the type allows, and unless the
  // row might have to be read again.
  const bool deferred = sizeof(Real) == 4 && p.grad == p.student;
  Real* es = grad && !deferred && width == sizeof(Real) ? (Real*)grad : scratch.student;
  const Sums<Real> sums = grad ? sweep1<Real, P, true>(p, student, teacher, es, scratch)
                               : sweep1<Real, P, false>(p, student, teacher, es, scratch);
  Factors f = {};
  if (soft && p.want_soft) {
    p.soft[i] = soft_loss(p, sums);
    if (!loss_is_exact(p, sums, p.soft[i])) return kNothing;
  }
  if (soft && p.alpha > 0) {
    f.student = p.soft_scale / sums.student;
    f.teacher = p.soft_scale / sums.teacher;
  }
  if (hard) p.hard[i] = hard_loss(p, sums, label, at_label, f);
  if (!grad) return kAll;
  // A cross entropy that is only logged leaves no trace in the gradient, not even in its last bit.
  const auto write = P != kNoCrossEntropy && p.alpha == 1 ? write_gradient<Real, kNoCrossEntropy>
                                                          : write_gradient<Real, P>;
  return write(p, sums, f, es, scratch, grad, deferred, label) ? kAll : kLoss;
}

template <typename Real>
Scratch<Real> carve(const KdProblem& p, char* memory) {
  const int64_t row_size = kd_scratch_row(p);
  Real* base = (Real*)memory;
  Real* maxima = base + 3 * row_size;
  return {base, base + row_size, base + 2 * row_size, maxima, maxima + p.classes / kBlock + 1};
}

template <typename Real>
Good visit(const KdProblem& p, int64_t i, char* memory) {
  const Scratch<Real> scratch = carve<Real>(p, memory);
  const double t = p.temperature;
  const int shared = t == 1 ? 1 : t == 2 ? 2 : t == 3 ? 3 : t == 4 ? 4 : kOwnExponential;
  switch (p.want_hard && p.hard_active(i) ? shared : kNoCrossEntropy) {
    case kNoCrossEntropy:
      return row<Real, kNoCrossEntropy>(p, i, scratch);
    case 1:
      return row<Real, 1>(p, i, scratch);
    case 2:
      return row<Real, 2>(p, i, scratch);
    case 3:
      return row<Real, 3>(p, i, scratch);
    case 4:
      return row<Real, 4>(p, i, scratch);
    default:
      return row<Real, kOwnExponential>(p, i, scratch);
  }
}

}  // namespace

extern "C" void KD_ENTRY(const KdProblem& p, int64_t begin, int64_t end, char* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    p.soft[i] = p.hard[i] = 0;
    if (!p.soft_active(i)) {  // not even read: it may hold NaN
      const int64_t width = element_size(p.student_dtype);
      if (p.grad) memset((char*)p.grad + p.grad_rows.start(i) * width, 0, p.classes * width);
      continue;
    }
    const Good good = p.in_double ? kNothing : visit<float>(p, i, scratch);
    if (good == kAll) continue;
    const double soft = p.soft[i], hard = p.hard[i];
    visit<double>(p, i, scratch);
    // A gradient done again leaves the loss alone: asking for one does not change the other.
    if (good == kLoss) p.soft[i] = soft, p.hard[i] = hard;
  }
}
