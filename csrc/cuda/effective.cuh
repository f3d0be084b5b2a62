// Logits as the models mean them: biased, scaled, soft-capped, mixed, and several teachers, or k
// classes of one, as a whole row. csrc/cpu/effective.inl, in double throughout.
#pragma once
#include "classes.cuh"
#include "elements.cuh"
#include "general.h"

namespace {

// cap * tanh(scale * (x + bias) / cap); without a cap the inside of it.
struct Mapping {
  double scale, cap;   // 0: no cap
  const double* bias;  // or null

  KD_DEVICE bool is_identity() const { return scale == 1 && cap == 0 && !bias; }
  KD_DEVICE double inside(double x, int64_t i) const { return scale * (bias ? x + bias[i] : x); }

  KD_DEVICE double of(double x, int64_t i) const {
    x = inside(x, i);
    if (cap == 0 || x == -INFINITY) return x;  // masked, and stays so
    const double less = expm1(-2 * fabs(x) / cap), value = -cap * less / (2 + less);
    return x < 0 ? -value : value;
  }
  // Its derivative, of the same x.
  KD_DEVICE double slope(double x, int64_t i) const {
    if (cap == 0) return scale;
    const double e = exp(-2 * fabs(inside(x, i)) / cap), sum = 1 + e;
    return scale * 4 * e / (sum * sum);
  }
};

// The mean and the standard deviation of the logits that are not masked.
struct Spread {
  double origin, mean;  // relative to the largest: their offset is nobody's rounding error
  double deviation, degrees;

  KD_DEVICE double divisor() const { return deviation + 1e-7; }  // the paper's
  KD_DEVICE double centred(double x) const { return x - origin - mean; }
};

// log(e^a + e^b).
KD_DEVICE double log_of_two(double a, double b) {
  const double max = a > b ? a : b, min = a > b ? b : a;
  // Both masked, or a NaN, which has no order.
  return max == -INFINITY || a != a || b != b ? a + b : max + log1p(exp(min - max));
}

class Effective {
 public:
  // The class of a top-k teacher that is not known; none of its logarithms is that.
  static constexpr double kUnknown = INFINITY;

  KD_DEVICE Effective(const KdGeneralProblem& problem, const Classes& the_classes)
      : p(problem), classes(the_classes) {}

  KD_DEVICE Mapping of_student() const {
    return {p.plan.student_scale, p.plan.softcap, p.plan.student_bias};
  }
  KD_DEVICE Row source(int64_t row) const {
    return row_at(p.student, p.student_dtype, p.student_rows.start(row));
  }
  // Each of these is the row as it lies in memory, or one that is made in `to`.
  KD_DEVICE Logits student(int64_t row, double* to) const {
    const Mapping mapping = of_student();
    const Row source = this->source(row);
    if (mapping.is_identity()) return as_it_is(source);
    return classes.write(to, [&](int64_t i) { return mapping.of(source[i], i); });
  }

  KD_DEVICE bool is_top_k() const { return p.plan.top_k.k > 0; }
  // Whether the classes that are not known are a class of their own, or none.
  KD_DEVICE bool has_tail() const { return is_top_k() && p.plan.top_k.tail != kRenormalize; }
  // Whether what a view compares with is several teachers.
  KD_DEVICE bool is_joint() const { return p.plan.teachers > 1 && p.plan.ensemble != kOfLosses; }
  KD_DEVICE int views() const { return is_joint() || is_top_k() ? 1 : p.plan.teachers; }
  KD_DEVICE double weight_of(int view) const {
    return is_joint() || is_top_k() ? 1 : p.plan.teacher[view].weight;
  }

  // The teacher of a view, as a pass is to divide it by `temperature`, which means of probabilities
  // depend on. `student`: TAID mixes it in; `other`: a row to work in.
  KD_DEVICE Logits teacher(int64_t row, int view, double temperature, bool standardize,
                           const Row& student, double* to, double* other) const {
    if (is_top_k()) return known_classes(row, to);
    if (is_joint() && p.plan.ensemble == kOfProbabilities)
      return mean_of_probabilities(row, temperature, standardize, student, to, other);
    if (!is_joint() && !standardize && of_teacher().is_identity() && p.plan.teacher_share == 1)
      return as_it_is(teacher_row(view, row));
    const Logits made = classes.write(to, [&](int64_t i) {
      return is_joint() ? mean_logit(row, student, i) : teacher_logit(view, row, student, i);
    });
    return standardize ? this->standardize(made, to) : made;
  }

  // The mean of the probabilities at temperature 1, whatever the loss makes of several.
  KD_DEVICE Logits mean_teacher(int64_t row, const Row& student, double* to, double* other) const {
    if (p.plan.teachers > 1 && p.plan.ensemble == kOfLosses)
      return mean_of_probabilities(row, 1, false, student, to, other);
    return teacher(row, 0, 1, false, student, to, other);
  }

  KD_DEVICE Spread spread_of(const Logits& row) const {
    Spread s = {reference_of(row.max), 0, 0, 1};
    const Numbers<2> n = classes.sums<2>([&](int64_t i, double (&sums)[2]) {
      const double x = row[i];
      if (x == -INFINITY) return;
      sums[0] += x - s.origin;
      sums[1] += 1;
    });
    const double count = n.of[1];
    s.mean = count > 0 ? n.of[0] / count : 0;
    s.degrees = count > 1 ? count - 1 : 1;
    const double squares = classes.sum(
        [&](int64_t i) { return row[i] == -INFINITY ? 0 : s.centred(row[i]) * s.centred(row[i]); });
    s.deviation = sqrt(squares / s.degrees);
    return s;
  }

 private:
  KD_DEVICE Logits as_it_is(const Row& row) const {
    return {row, classes.max([&](int64_t i) { return row[i]; })};
  }
  KD_DEVICE Row teacher_row(int k, int64_t row) const {
    const KdTeacher& t = p.plan.teacher[k];
    return row_at(t.logits, t.dtype, t.rows.start(row));
  }
  KD_DEVICE Mapping of_teacher() const {
    return {p.plan.teacher_scale, p.plan.softcap, p.plan.teacher_bias};
  }

  KD_DEVICE double teacher_logit(int k, int64_t row, const Row& student, int64_t i) const {
    const double share = p.plan.teacher_share;
    if (share == 0) return student[i];  // 0 * inf
    const double x = of_teacher().of(teacher_row(k, row)[i], i);
    return share == 1 ? x : (1 - share) * student[i] + share * x;
  }

  KD_DEVICE Logits standardize(const Logits& logits, double* to) const {
    const Spread s = spread_of(logits);
    return classes.write(to, [&](int64_t i) { return (logits[i] - s.origin) / s.divisor(); });
  }

  KD_DEVICE double mean_logit(int64_t row, const Row& student, int64_t i) const {
    double sum = 0;
#pragma unroll 1
    for (int k = 0; k < p.plan.teachers; ++k)
      sum += p.plan.teacher[k].weight * teacher_logit(k, row, student, i);
    return sum;
  }

  // T log of the mean, for a pass to divide by T.
  KD_DEVICE Logits mean_of_probabilities(int64_t row, double temperature, bool standardize,
                                         const Row& student, double* to, double* other) const {
#pragma unroll 1
    for (int k = 0; k < p.plan.teachers; ++k) {
      Logits one =
          classes.write(other, [&](int64_t i) { return teacher_logit(k, row, student, i); });
      if (standardize) one = this->standardize(one, other);
      const Softmax& softmax = classes.softmax<2>(one, temperature);
      const double log_weight = log(p.plan.teacher[k].weight);
      classes.each([&](int64_t i) {
        const double x = softmax.log(other[i]) + log_weight;
        to[i] = k == 0 ? x : log_of_two(to[i], x);
      });
    }
    return classes.write(to, [&](int64_t i) { return to[i] * temperature; });
  }

  // The k classes that are known; the others have no mass, or have kUnknown in their place. An
  // entry that is none, or out of range, makes the row NaN.
  KD_DEVICE Logits known_classes(int64_t row, double* to) const {
    const KdTopK& t = p.plan.top_k;
    const double* const values = t.values + row * t.k;
    const int64_t* const indices = t.indices + row * t.k;
    const bool tail = has_tail();
    const auto is_bad = [&](int64_t k) {
      return indices[k] < 0 || indices[k] >= p.classes || !(values[k] < INFINITY);
    };
    classes.sync();
    classes.each([&](int64_t i) { to[i] = tail ? kUnknown : -INFINITY; });
    classes.sync();
    const double max = classes.max_of(t.k, [&](int64_t k) {
      if (is_bad(k)) return static_cast<double>(NAN);
      return to[indices[k]] = values[k];
    });
    if (classes.leads() && max != max) to[0] = NAN;
    classes.sync();
    return {{to, kFloat64}, max};
  }

  const KdGeneralProblem& p;
  const Classes& classes;
};

}  // namespace
