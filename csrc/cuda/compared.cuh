// What a pass makes of the student's row and the teacher's: the divergence between them, and its
// gradient but for a factor of the row. v is q df/dq of a class; the gradient is v - q sum v, or
// where a class is nearly all there is, the same summed over the others, as that would cancel.
#pragma once
#include "effective.cuh"

namespace {

#include "../divergence_math.inl"

struct Rows {
  Logits student, teacher;
  double* v;  // in the block's scratch memory
};

// What is asked of them.
struct Look {
  const KdTerm* terms;  // of a mixture
  int count;
  bool forward;  // the forward KL, whatever the terms are
  double temperature, teacher_temperature;
};

// The student's mass on the classes that a top-k teacher says nothing of, as one class.
struct Rest {
  bool is_there;
  double log_p, log_q, q, v;
};

KD_DEVICE double entropy(const Classes& classes, const Row& row, const Softmax& of) {
  return -classes.sum([&](int64_t i) {
    const double log = of.log(row[i]);
    return log == -INFINITY ? 0 : exp(log) * log;
  });
}

class Mixture {
 public:
  KD_DEVICE Mixture(const KdGeneralProblem& problem, const Classes& the_classes,
                    const Effective& logits, const Rows& the_rows, const Look& the_look)
      : p(problem),
        classes(the_classes),
        rows(the_rows),
        look(the_look),
        tail(logits.has_tail()),
        of_q(classes.softmax<1>(rows.student, look.temperature)),
        of_p(tail ? classes.softmax_of_some<2>(rows.student, look.temperature, IsUnknown{rows})
                  : classes.softmax<2>(rows.teacher, look.teacher_temperature)),
        term(block_shared<Term>()),
        rest(block_shared<Rest>()) {
    find_rest();
  }

  // The value; the gradient is left in rows.v.
  KD_DEVICE double compare(int64_t row) {
    double value = 0;
    bool begun = false;  // rows.v holds something
#pragma unroll 1
    for (int k = 0; k < look.count; ++k) {
      const Term own = look.forward ? Term{kForwardKL, 1, 0, 1, 0, 1} : term_of(look.terms[k], row);
      if (own.weight == 0) continue;
      prepare(own);
      value += term.weight * value_of_term(add(begun));
      begun = true;
    }
    if (!begun) {
      classes.each([&](int64_t i) { rows.v[i] = 0; });
      return 0;
    }
    if (p.grad) differentiate();
    if (!(of_q.sum > 0) || (!tail && !(of_p.sum > 0))) return NAN;  // no distribution
    return value;
  }

 private:
  struct IsUnknown {
    const Rows& rows;
    KD_DEVICE bool operator()(int64_t i) const { return rows.teacher[i] == Effective::kUnknown; }
  };
  KD_DEVICE bool is_known(int64_t i) const { return !tail || !IsUnknown{rows}(i); }
  KD_DEVICE bool only_known() const { return tail && p.plan.top_k.tail == kZero; }
  KD_DEVICE double log_p(int64_t i) const {
    return tail ? rows.teacher[i] : of_p.log(rows.teacher[i]);
  }
  KD_DEVICE double log_q(int64_t i) const { return of_q.log(rows.student[i]); }

  // Of a teacher that gives log-probabilities of some classes: of_p is the student's softmax among
  // the others.
  KD_DEVICE void find_rest() {
    Rest found = {false, -INFINITY, -INFINITY, 0, 0};
    if (tail) {
      found.log_q = of_p.log_total() - of_q.log_total();
      found.q = exp(found.log_q);
      const double known =
          classes.sum([&](int64_t i) { return is_known(i) ? exp(rows.teacher[i]) : 0; });
      found.is_there = !only_known() && p.plan.top_k.k < p.classes;
      if (found.is_there && known < 1) found.log_p = log1p(-known);
    }
    if (classes.leads()) rest = found;
    classes.sync();
  }

  // ---- terms ------------------------------------------------------------------------------------

  // The term with what it needs of the whole row.
  KD_DEVICE void prepare(Term t) const {
    if (t.kind == kRenyi || t.kind == kAgreement) t.shift = log_of_powers(t);
    if (t.kind == kEntropyGap)
      t.norm = entropy(classes, rows.teacher, of_p) - entropy(classes, rows.student, of_q);
    if (t.kind == kCorrelation) prepare_correlation(t);
    classes.sync();  // the one before is done
    if (classes.leads()) term = t;
    classes.sync();
  }

  KD_DEVICE static double power(const Term& t, double log_p, double log_q) {
    return t.kind == kAgreement ? log_p + log_q : log_of_power(t.parameter, log_p, log_q);
  }
  KD_DEVICE double log_of_powers(const Term& t) const {
    const double of_known = classes.log_of_sum(
        [&](int64_t i) { return is_known(i) ? power(t, log_p(i), log_q(i)) : -INFINITY; });
    return rest.is_there ? log_of_two(of_known, power(t, rest.log_p, rest.log_q)) : of_known;
  }

  KD_DEVICE void prepare_correlation(Term& t) const {
    const double mean = 1.0 / static_cast<double>(p.classes);
    const Numbers<3> n = classes.sums<3>([&](int64_t i, double (&sums)[3]) {
      const double a = exp(log_p(i)) - mean, b = exp(log_q(i)) - mean;
      sums[0] += a * a, sums[1] += b * b, sums[2] += a * b;
    });
    const bool constant = !(n.of[0] > 1e-24 && n.of[1] > 1e-24);
    t.parameter = mean;
    t.norm = constant ? 0 : 1 / sqrt(n.of[0]);
    t.shift = constant ? 0 : 1 / sqrt(n.of[1]);
    t.inverse_sum = 1 - n.of[2] * t.norm * t.shift;
  }

  // The sum of its values; its v is added to those of the others.
  KD_DEVICE double add(bool begun) {
    double total = classes.sum([&](int64_t i) {
      if (!is_known(i)) return 0.0;
      const Compared c = of_class(log_p(i), log_q(i));
      rows.v[i] = (begun ? rows.v[i] : 0) + term.weight * c.v;
      return c.value;
    });
    if (!rest.is_there) return total;
    const Compared c = of_class(rest.log_p, rest.log_q);
    if (classes.leads()) rest.v += term.weight * c.v;
    return total + c.value;
  }

  KD_DEVICE Compared of_class(double log_p, double log_q) const {
    const Term& t = term;
    switch (t.kind) {
      case kAlphaDivergence: {  // the 1 of all classes is taken off each
        const double a = t.parameter, w = exp(log_of_power(a, log_p, log_q));
        const double one = only_known() ? 0 : a * exp(log_p) + (1 - a) * exp(log_q);
        return {w - one, -w / a};
      }
      case kRenyi:
      case kAgreement:
        return {0, -exp(power(t, log_p, log_q) - t.shift)};
      case kEntropyGap:
        return {0, log_q == -INFINITY ? 0 : 2 * t.norm * exp(log_q) * log_q};
      case kCorrelation: {  // half the squared distance of their directions
        const double q = exp(log_q), of_p = (exp(log_p) - t.parameter) * t.norm;
        const double of_q = (q - t.parameter) * t.shift, apart = of_q - of_p;
        return {apart * apart / 2, q * t.shift * (apart - of_q * t.inverse_sum)};
      }
      default:
        return compare_class(t, log_p, log_q);
    }
  }

  KD_DEVICE double value_of_term(double total) const {
    const Term& t = term;
    const double a = t.parameter;
    double value = total;
    if (t.kind == kAlphaDivergence) value = (total - (only_known() ? 1 : 0)) / (a * (a - 1));
    if (t.kind == kRenyi) value = t.shift / (a - 1);
    if (t.kind == kAgreement) value = -t.shift;
    if (t.kind == kEntropyGap) value = t.norm * t.norm;
    if (t.kind == kCorrelation && t.norm == 0) value = 1;  // of a constant row
    return value < 0 && !only_known() ? 0 : value;         // rounding
  }

  // ---- gradient ---------------------------------------------------------------------------------

  KD_DEVICE void differentiate() {
    const bool sure = of_q.is_sure();
    const Numbers<4> n = classes.sums<4>([&](int64_t i, double (&sums)[4]) {
      if (!is_known(i)) return;
      const double q = exp(log_q(i)), v = rows.v[i];
      sums[0] += q, sums[1] += v;
      if (rows.student[i] != of_q.max) sums[2] += q, sums[3] += v;
    });
    const double mean = n.of[1] + rest.v;
    const double others = n.of[2] + rest.q, others_v = n.of[3] + rest.v;
    // Nearly all of df/dq may be the mean: the difference is had from the known classes.
    const double rest_gradient = rest.v * n.of[0] - rest.q * n.of[1];
    classes.each([&](int64_t i) {
      const double x = rows.student[i], q = exp(of_q.log(x)), v = rows.v[i];
      if (!is_known(i))
        rows.v[i] = x == -INFINITY ? 0 : exp(of_p.log(x)) * rest_gradient;
      else
        rows.v[i] = sure && x == of_q.max ? v * others - q * others_v : v - q * mean;
    });
  }

  const KdGeneralProblem& p;
  const Classes& classes;
  const Rows& rows;
  const Look& look;
  const bool tail;
  const Softmax &of_q, &of_p;
  Term& term;  // the one at hand, in the block's memory
  Rest& rest;  // there, too
};

// alpha times the divergence of the label against all else, and beta times that among all else.
// The gradient is left in rows.v.
struct Decoupled {
  double alpha, beta;
  bool with_entropy;  // beta times the cross entropy among all else

  KD_DEVICE explicit Decoupled(const KdTerm& t)
      : alpha(t.kind == kNormalized ? 0 : t.parameter),
        beta(t.kind == kNormalized ? t.parameter : t.second),
        with_entropy(t.kind == kNormalized) {}

  KD_DEVICE double compare(const KdGeneralProblem& p, const Classes& classes, const Rows& rows,
                           const Look& look, int64_t label) const {
    const auto is_other = [&](int64_t i) { return i != label; };
    const Softmax& of_q = classes.softmax_of_some<1>(rows.student, look.temperature, is_other);
    const Softmax& of_p =
        classes.softmax_of_some<2>(rows.teacher, look.teacher_temperature, is_other);
    const Odds odds_p(of_p.log(rows.teacher[label])), odds_q(of_q.log(rows.student[label]));
    double value = 0, more = 0;  // a term of weight zero is no part of the loss
    if (alpha != 0) {
      const double target = divergence_of(odds_p.is, odds_p.log_is, odds_q.log_is) +
                            divergence_of(odds_p.is_not, odds_p.log_is_not, odds_q.log_is_not);
      value += alpha * (target < 0 ? 0 : target);  // rounding
      // Of the two differences the one that does not cancel.
      more = alpha * (odds_q.is > 0.5 ? odds_p.is_not - odds_q.is_not : odds_q.is - odds_p.is);
    }
    const double share = of_p.sum == 0 ? 0 : beta;  // nothing but the label has mass
    if (share != 0) value += share * among_others(classes, rows, of_p, of_q, is_other);
    if (p.grad) differentiate(classes, rows, of_p, of_q, label, share, more);
    return value;
  }

 private:
  KD_DEVICE static double probability(const Softmax& of, double x) {
    return x == -INFINITY ? 0 : exp(of.log(x));
  }

  template <typename F>
  KD_DEVICE double among_others(const Classes& classes, const Rows& rows, const Softmax& of_p,
                                const Softmax& of_q, F is_other) const {
    const double value = classes.sum([&](int64_t i) {
      const double t = rows.teacher[i], s = rows.student[i];
      if (!is_other(i) || t == -INFINITY) return 0.0;
      const double log_p = of_p.log(t), log_q = s == -INFINITY ? s : of_q.log(s), of = exp(log_p);
      return with_entropy ? (of == 0 ? 0 : -of * log_q) : of * (log_p - log_q);
    });
    return value < 0 ? 0 : value;  // rounding
  }

  KD_DEVICE void differentiate(const Classes& classes, const Rows& rows, const Softmax& of_p,
                               const Softmax& of_q, int64_t label, double share,
                               double more) const {
    const Numbers<2> others = classes.sums<2>([&](int64_t i, double (&sums)[2]) {
      if (i == label || rows.student[i] == of_q.max) return;
      sums[0] += share == 0 ? 0 : probability(of_p, rows.teacher[i]);
      sums[1] += probability(of_q, rows.student[i]);
    });
    const bool sure = of_q.is_sure();
    classes.each([&](int64_t i) {
      const double x = rows.student[i], of = share == 0 ? 0 : probability(of_p, rows.teacher[i]);
      const double q = probability(of_q, x);
      const double apart = sure && x == of_q.max ? others.of[0] - others.of[1] : q - of;
      rows.v[i] = i == label ? more : (share == 0 ? 0 : share * apart) - more * q;
    });
  }
};

}  // namespace
