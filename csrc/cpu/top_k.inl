// A teacher of which only k classes of a row are known. The student's softmax runs over all
// classes; those that the teacher says nothing of are one class as far as a divergence goes: all of
// them have the same df/dq. So the sweeps are over the student alone, the k entries are computed
// one by one in double, and no row of the teacher is ever made. Included inside an anonymous
// namespace, after jobs.inl.

struct KnownClass {
  int64_t index;
  double logit;  // the student's
  double log_p, log_q;
  double v;  // q df/dq
};

template <typename Real>
struct KnownRow {
  const KdProblem& p;   // of this row alone
  KnownClass* classes;  // [count]
  int64_t count;
  KdTail tail;
  const Real* logits;  // the student's
  Real* row;           // the others' exponentials, and then the gradient

  double max, sum;  // of the others
  double log_sum;   // of all
  double rest;      // df/dq of the others
  double mean;      // sum of v
  double value;

  // The others' exponentials, and their sum. Relative to the largest of all: that of the others
  // takes another look, and is worth it only where theirs would be too small for Real.
  void sweep() {
    sweep(copy_of((const char*)logits, kTypeOf<Real>, p.classes, row));
    if (sum > 0x1p-40 || sum != sum) return;
    memcpy(row, logits, p.classes * sizeof(Real));
    for (int64_t k = 0; k < count; ++k) row[classes[k].index] = -INFINITY;
    sweep(highest_of(row, p.classes));
  }

  void sweep(Real highest) {
    typedef Vec<Real> V;
    constexpr int L = Lanes<Real>::kCount;
    const Real masked = -INFINITY;
    for (int64_t k = 0; k < count; ++k) row[classes[k].index] = masked;
    const Exponent<Real> exponent(kLog2E / p.temperature);
    const V top = splat(reference_of(highest)), lowest = splat(lowest_number(Real()));
    WideSum<Real> total;
    int64_t i = 0;
    for (; i + 4 * L <= p.classes; i += 4 * L) {
      V e[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) e[k] = at_least(load(row + i + k * L) - top, lowest);
      exp2_scaled<Real>(e, exponent);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) store(row + i + k * L, e[k]);
      total.add((e[0] + e[1]) + (e[2] + e[3]));
    }
    each<Real>(p.classes - i, [&](int64_t k, auto part) __attribute__((always_inline)) {
      const V x = part.get(row + i + k, masked) - top;
      const V e = exp2_scaled<Real>(at_least(x, lowest), exponent);
      part.put(row + i + k, e);
      total.add(part.keep(e));
    });
    sum = total.total(), max = reference_of(highest) / p.temperature;
  }

  // log of the sum over all classes.
  double log_total() const {
    if (sum != sum) return NAN;
    const double of_others = max + log(sum);
    double largest = of_others, total = 0;
    for (int64_t k = 0; k < count; ++k)
      if (!(classes[k].logit / p.temperature <= largest))
        largest = classes[k].logit / p.temperature;
    for (int64_t k = 0; k < count; ++k) total += exp(classes[k].logit / p.temperature - largest);
    return largest + log(total + exp(of_others - largest));
  }

  // The soft term, and each known class's v.
  void compare() {
    log_sum = log_total();
    double known = 0;
    for (int64_t k = 0; k < count; ++k) {
      classes[k].log_q = classes[k].logit / p.temperature - log_sum, classes[k].v = 0;
      known += exp(classes[k].log_p);
    }
    const double log_rest = max + log(sum) - log_sum;
    const bool any = tail == kBucket && known < 1 && count < p.classes;
    const double log_tail = any ? log1p(-known) : -INFINITY;
    value = mean = rest = 0;
    for (int k = 0; k < p.terms; ++k) add(term_of(p.term[k], 0), log_tail, log_rest);
    // Of one class: v is that of all of them.
    rest = sum > 0 ? rest / exp(log_rest) : sum;
  }

  void add(const Term& t, double log_tail, double log_rest) {
    if (t.weight == 0) return;
    const Compared others = tail == kZero ? Compared{0, 0} : compare_class(t, log_tail, log_rest);
    double total = others.value;
    for (int64_t k = 0; k < count; ++k)
      total += compare_class(t, classes[k].log_p, classes[k].log_q).value;
    double of_term = total, factor = t.weight;
    const double a = t.parameter;
    if (t.kind == kAlphaDivergence) of_term = (total - 1) / (a * (a - 1)), factor *= -1 / a;
    if (t.kind == kRenyi) of_term = log(total) / (a - 1), factor *= -1 / total;
    if (t.kind == kAgreement) of_term = -log(total), factor *= 1 / total;
    if (tail != kZero && of_term < 0) of_term = 0;  // rounding
    value += t.weight * of_term;
    for (int64_t k = 0; k < count; ++k) {
      const double v = factor * compare_class(t, classes[k].log_p, classes[k].log_q).v;
      classes[k].v += v, mean += v;
    }
    rest += factor * others.v, mean += factor * others.v;
  }

  // The gradient in the place of the exponentials. float32 is enough: nothing cancels among the
  // others, and the known classes are in double.
  void write(double scale) {
    double below = 0;  // df/dq of the others less the mean, of which it may be nearly all
    for (int64_t k = 0; k < count; ++k) below += exp(classes[k].log_q) * rest - classes[k].v;
    multiply(row, (Real)(scale * below * exp(max - log_sum)), p.classes);
    for (int64_t k = 0; k < count; ++k) row[classes[k].index] = (Real)(scale * gradient_of(k));
  }

  double gradient_of(int64_t k) const {
    const double q = exp(classes[k].log_q), v = classes[k].v;
    if (!(q > 0.5)) return v - q * mean;
    // Nearly all there is: both are summed over all other classes instead.
    const double of_rest = sum > 0 ? exp(max + log(sum) - log_sum) : 0;
    double others = of_rest, others_v = rest * of_rest;
    for (int64_t j = 0; j < count; ++j)
      if (j != k) others += exp(classes[j].log_q), others_v += classes[j].v;
    return v * others - q * others_v;
  }
};
