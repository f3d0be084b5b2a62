// What divergences are of single numbers: a class's two probabilities, or a class against all
// others. In double, on the CPU and on the GPU. Included inside an anonymous namespace, after
// math.h and plan.h.

// A term of the mixture, for one row.
struct Term {
  KdDivergence kind;
  double weight, parameter, norm, shift, inverse_sum;
};

// A term as it is for this row: with its own weight and parameter, which may make it another one.
KD_INLINE Term term_of(const KdTerm& term, int64_t row) {
  Term t = {term.kind,
            term.row_weight ? term.row_weight[row] : term.weight,
            term.row_parameter ? term.row_parameter[row] : term.parameter,
            1,
            0,
            1};
  const double a = t.parameter;
  switch (t.kind) {
    case kJensenShannon:
      if (a == 0) t.kind = kForwardKL;
      if (a == 1) t.kind = kReverseKL;
      break;
    case kSkewForwardKL:
    case kSkewReverseKL:
      if (a == 1) t.weight = 0;
      if (a == 0) t.kind = t.kind == kSkewForwardKL ? kForwardKL : kReverseKL;
      break;
    case kAlphaDivergence:
    case kRenyi:
      if (a == 1) t.kind = kForwardKL;
      if (a == 0) t.kind = kReverseKL;
      break;
    case kCorrelation:
      t.weight *= a;
      break;
    default:
      break;
  }
  return t;
}

struct Compared {
  double value, v;
};

// log of p^a q^(1 - a); of classes that only one of the two has it is infinite where a says so.
KD_INLINE double log_of_power(double a, double log_p, double log_q) {
  const bool no_p = log_p == -INFINITY, no_q = log_q == -INFINITY;
  if (no_p) return no_q || a > 0 ? -INFINITY : INFINITY;
  if (no_q) return a < 1 ? -INFINITY : INFINITY;
  return a * log_p + (1 - a) * log_q;
}

// f(p, q) and q df/dq of one class. Both are of degree 1 in (p, q), so that a class of the
// student's mass alone, however many it stands for, is compared like any other.
KD_INLINE Compared compare_class(const Term& t, double log_p, double log_q) {
  const double p = exp(log_p), q = exp(log_q), a = t.parameter;
  const bool no_p = log_p == -INFINITY, no_q = log_q == -INFINITY;
  if (no_p && no_q) return {0, 0};
  const double distance = log_q - log_p;
  // log(p / m) and log(q / m) of the mixture m = w p + (1 - w) q.
  const auto mixed = [&](double w) {
    const double larger = log_p > log_q ? log_p : log_q;
    return larger + log(w * exp(log_p - larger) + (1 - w) * exp(log_q - larger));
  };
  switch (t.kind) {
    case kForwardKL:
      return {no_p ? 0 : no_q ? INFINITY : -p * distance, -p};
    case kReverseKL:
      return {no_q ? 0 : no_p ? INFINITY : q * distance, no_q ? 0 : q * (distance + 1)};
    case kJensenShannon: {
      const double m = mixed(a), of_p = no_p ? 0 : p * (log_p - m), of_q = no_q ? 0 : log_q - m;
      return {a * of_p + (1 - a) * q * of_q, (1 - a) * q * of_q};
    }
    case kSkewForwardKL: {
      const double m = mixed(a);
      return {no_p ? 0 : p * (log_p - m), -(1 - a) * exp(log_p + log_q - m)};
    }
    case kSkewReverseKL: {
      const double m = mixed(1 - a), of_q = no_q ? 0 : log_q - m;
      return {q * of_q, q * (of_q + 1 - a * exp(log_q - m))};
    }
    case kTotalVariation:
      return {fabs(p - q) / 2, q > p ? q / 2 : q < p ? -q / 2 : 0};
    case kAgreement: {
      const double both = exp(log_p + log_q);
      return {both, -both};
    }
    default: {  // p^a q^(1 - a), for the two that are made of its sum
      const double power = exp(log_of_power(a, log_p, log_q));
      return {power, power};
    }
  }
}

KD_INLINE double softplus(double x) { return log1p(exp(-fabs(x))) + (x > 0 ? x : 0); }

// A class against all others, of its log-odds.
struct Odds {
  double is, is_not, log_is, log_is_not;
  KD_INLINE explicit Odds(double z)
      : is(1 / (1 + exp(-z))),
        is_not(1 / (1 + exp(z))),
        log_is(-softplus(-z)),
        log_is_not(-softplus(z)) {}
};

// a (log a - log b); nothing for a probability of 0.
KD_INLINE double divergence_of(double a, double log_a, double log_b) {
  return a == 0 ? 0 : a * (log_a - log_b);
}

// log-odds of a logit against the others', which add up to `sum` relative to `max`.
KD_INLINE double log_odds(double logit, double max, double temperature, double sum) {
  return (logit - max) / temperature - log(sum);
}
