// The fused kernel: temperature softmax of both rows, KL divergence and cross entropy, and the
// gradient. Sweep 1 collects the row's statistics and leaves the exponentials in scratch (the
// student's in the gradient row itself where that is of the same type); sweep 2 only rescales them.
// Beside the gradient only a thread's scratch rows are written, which stay in its cache; a large
// gradient goes past the caches, and then the student's exponentials are in scratch, too.
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

#include "../row_math.inl"

#include "vectors.inl"

#include "elements.inl"

#include "sweeps.inl"

// Of an exponential: without FMA the products of the polynomial are rounded, too.
#if defined(__FMA__) || defined(__aarch64__)
constexpr double kError = kEpsilon;
#else
constexpr double kError = 2 * kEpsilon;
#endif

// ---- one row -----------------------------------------------------------------------------------

// Sweep 2 with the entries that cancel put in; false, and in place nothing is lost, if float32 was
// not enough.
template <typename Real, int P>
bool write_gradient(const KdProblem& p, const Sums<Real>& sums, const Factors& f,
                    const Place<Real>& place, const Scratch<Real>& scratch, int64_t label) {
  const bool hard = P != kNoCrossEntropy;
  Real* const es = place.es;
  const Sure sure = sure_class<Real, P>(p, sums, es, scratch);
  Entry entries[] = {label_entry<Real, P>(p, sums, f, es, scratch, label), {sure.index, 0}};
  if (sure.index >= 0) entries[1].gradient = sure_gradient(p, f, sure, hard, label);
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
  squares += sweep2<Real, P>(p, sums, f, place, scratch);
  if (!gradient_is_exact(p, sums, f, hard, sure, squares, kError)) return false;
  if (place.later) store_block(es, p.classes, p.student_dtype, place.grad, 0, false);
  for (const Entry& e : entries) {
    const Real value = (Real)e.gradient;
    if (e.index >= 0) store_block(&value, 1, p.student_dtype, place.grad, e.index, false);
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

  Place<Real> place = {scratch.student, grad, false, false, false};
  if (grad) {
    place.later = sizeof(Real) == 4 && p.grad == p.student;
    place.direct = !place.later && width == sizeof(Real);
    place.stream = !place.later && p.stream && can_stream(grad);
    // The exponentials are left where the gradient will be, if they may.
    if (place.direct && !place.stream) place.es = (Real*)grad;
  }
  const int64_t next = i + 1 < p.rows ? i + 1 : i;
  const char* next_student = (const char*)p.student + p.student_rows.start(next) * width;
  const char* next_teacher =
      (const char*)p.teacher + p.teacher_rows.start(next) * element_size(p.teacher_dtype);
  const auto sweep = grad ? sweep1<Real, P, true> : sweep1<Real, P, false>;
  const Sums<Real> sums = sweep(p, student, teacher, next_student, next_teacher, place.es, scratch);
  Factors f = {};
  if (soft && p.want_soft) {
    p.soft[i] = soft_loss(p, sums);
    if (!loss_is_exact(p, sums, p.soft[i], kError)) return kNothing;
  }
  if (soft && p.alpha > 0) soft_factors(p.scales, sums, f);
  if (hard) p.hard[i] = hard_loss(p, p.scales, sums, label, at_label, f);
  if (!grad) return kAll;
  // A cross entropy that is only logged leaves no trace in the gradient, not even in its last bit.
  const auto write = P != kNoCrossEntropy && p.alpha == 1 ? write_gradient<Real, kNoCrossEntropy>
                                                          : write_gradient<Real, P>;
  return write(p, sums, f, place, scratch, label) ? kAll : kLoss;
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
  if (p.stream) finish_streams();
}
