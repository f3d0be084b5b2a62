// Divergences between p (teacher) and q (student) that need both normalised: a sweep between the
// two, from the exponentials that the first has left to v = q df/dq, which the last takes for the
// teacher's exponentials: the gradient of any of them is (v - q sum v) / T. Included inside an
// anonymous namespace, after sweeps.inl and policies.inl.

template <typename Real>
KD_INLINE double total_of(Vec<Real> v) {
  WideSum<Real> sum;
  sum.add(v);
  return sum.total();
}

// A block of a row between the sweeps.
template <typename Real>
struct BlockBetween {
  const Real *es, *et, *distance, *exponent;
  int64_t n;
  Real to_q, to_p, constant;
  Real maximum;  // the student's exponential of a class that it may be sure of
};

template <typename Real>
struct SumsBetween {
  double value = 0, v = 0, constant = 0;
  double off = 0, off_at_max = 0;  // squares, of the classes but the maximum, and of that
};

template <typename Real, typename Policy>
SumsBetween<Real> add_terms(const Policy policy, const BlockBetween<Real> block, double weight,
                            Real* v, bool first) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  const V to_q = splat(block.to_q), to_p = splat(block.to_p), constant = splat(block.constant);
  const V share = splat((Real)weight), maximum = splat(block.maximum);
  const V spread = splat(1 + 2 * (block.constant < 0 ? -block.constant : block.constant));
  WideSum<Real> value, sum, constants;
  V off = {}, off_at_max = {};
  auto classes = [&](V es, V et, V distance, V exponent) __attribute__((always_inline)) {
    return Classes<V>{et * to_p, es * to_q, distance, distance + constant, exponent, spread};
  };
  auto bound = [&](V es, V error) __attribute__((always_inline)) {
    const auto is_max = es == maximum;
    const V others = is_max ? V{} : error, at_max = is_max ? error : V{};
    off += others * others;
    off_at_max += at_max * at_max;
  };
  auto add = [&](V values, V vs, V constant_terms) __attribute__((always_inline)) {
    value.add(values);
    sum.add(vs);
    if (Policy::kConstant) constants.add(constant_terms);
  };
  auto whole = [&](int64_t i, auto n) __attribute__((always_inline)) {
    constexpr int N = decltype(n)::value;
    Classes<V> c[N];
    Terms<V> t[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k)
      c[k] = classes(load(block.es + i + k * L), load(block.et + i + k * L),
                     load(block.distance + i + k * L), load(block.exponent + i + k * L));
    policy.at(c, t);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      bound(load(block.es + i + k * L), t[k].off);
      Real* const to = v + i + k * L;
      store(to, first ? t[k].v * share : load(to) + t[k].v * share);
    }
    // Pairs are summed before they are widened, as in exponentials().
#pragma GCC unroll 2
    for (int k = 0; k + 1 < N; k += 2)
      add(t[k].value + t[k + 1].value, t[k].v + t[k + 1].v, t[k].constant + t[k + 1].constant);
    if (N == 1) add(t[0].value, t[0].v, t[0].constant);
  };
  int64_t i = 0;
  for (; i + 4 * L <= block.n; i += 4 * L) whole(i, std::integral_constant<int, 4>());
  for (; i + L <= block.n; i += L) whole(i, std::integral_constant<int, 1>());
  if (const int64_t left = block.n - i) {
    const Real none = 0;
    const auto part = [&](const Real* x) { return load_part(x + i, left, none); };
    const V es = part(block.es);
    const Classes<V> c[1] = {
        classes(es, part(block.et), part(block.distance), part(block.exponent))};
    Terms<V> t[1];
    policy.at(c, t);
    bound(es, keep_part(t[0].off, left));
    store_part(v + i, left, first ? t[0].v * share : part(v) + t[0].v * share);
    add(keep_part(t[0].value, left), keep_part(t[0].v, left), keep_part(t[0].constant, left));
  }
  return {value.total(), sum.total(), constants.total(), weight * weight * total_of<Real>(off),
          weight * weight * total_of<Real>(off_at_max)};
}

// The logits of a block as distances and exponents.
template <typename Real, typename S, typename T>
void measure(const KdProblem& p, const Sums<Real>& sums, const S* student, const T* teacher,
             int64_t n, Real* distance, Real* exponent) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  const double inverse = 1 / p.temperature, teacher_inverse = 1 / p.teacher_temperature;
  const bool equal = p.temperature == p.teacher_temperature;
  const V student_max = splat(reference_of(sums.student_max));
  const V teacher_max = splat(reference_of(sums.teacher_max));
  // In the place of -inf: 0 times it is 0, and times 1 / T it is still a number.
  const double smaller =
      p.temperature < p.teacher_temperature ? p.temperature : p.teacher_temperature;
  const V lowest = splat((Real)(-0x1p100 * (smaller < 1 ? smaller : 1)));
  auto step = [&](V x, V y, Real* d, Real* e) __attribute__((always_inline)) {
    const V ds = at_least(x - student_max, lowest), dt = at_least(y - teacher_max, lowest);
    const V a = ds * (Real)inverse;
    // Masked in both: as far from each other as any classes of no mass.
    const V apart = dt == lowest && ds == lowest ? V{} : a - dt * (Real)teacher_inverse;
    store(d, equal ? (ds - dt) * (Real)inverse : apart);
    store(e, a);
  };
  int64_t i = 0;
  for (; i + L <= n; i += L)
    step(Read<Real, S>::at(student + i), Read<Real, T>::at(teacher + i), distance + i,
         exponent + i);
  if (i < n) {
    Real x[L] = {}, y[L] = {}, d[L], e[L];
    for (int64_t k = i; k < n; ++k) {
      x[k - i] = (Real)value_of(student[k]);
      y[k - i] = (Real)value_of(teacher[k]);
    }
    step(load(x), load(y), d, e);
    memcpy(distance + i, d, (n - i) * sizeof(Real));
    memcpy(exponent + i, e, (n - i) * sizeof(Real));
  }
}

template <typename Real, typename S>
void measure(const KdProblem& p, const Sums<Real>& sums, const S* student, const char* teacher,
             int64_t first, int64_t n, Real* distance, Real* exponent) {
  switch (p.teacher_dtype) {
    case kFloat32:
      return measure(p, sums, student, (const float*)teacher + first, n, distance, exponent);
    case kBFloat16:
      return measure(p, sums, student, (const BFloat16*)teacher + first, n, distance, exponent);
    case kFloat16:
      return measure(p, sums, student, (const Float16*)teacher + first, n, distance, exponent);
    default:
      return measure(p, sums, student, (const double*)teacher + first, n, distance, exponent);
  }
}

template <typename Real>
void measure(const KdProblem& p, const Sums<Real>& sums, int64_t row, int64_t first, int64_t n,
             Real* distance, Real* exponent) {
  const char* const s =
      (const char*)p.student + p.student_rows.start(row) * element_size(p.student_dtype);
  const char* const t =
      (const char*)p.teacher + p.teacher_rows.start(row) * element_size(p.teacher_dtype);
  switch (p.student_dtype) {
    case kFloat32:
      return measure(p, sums, (const float*)s + first, t, first, n, distance, exponent);
    case kBFloat16:
      return measure(p, sums, (const BFloat16*)s + first, t, first, n, distance, exponent);
    case kFloat16:
      return measure(p, sums, (const Float16*)s + first, t, first, n, distance, exponent);
    default:
      return measure(p, sums, (const double*)s + first, t, first, n, distance, exponent);
  }
}

// What the sweep between the two comes to.
struct Between {
  double loss,
      loss_off;   // of the soft term, scaled; by how many times forward KL's error it is off
  double factor;  // of v, for what is below and the gradient
  double mean;    // sum of v
  double off, off_at_max;  // squares of what v may be off by, in roundings
  bool vanished;           // a sum whose logarithm is the loss is too small for Real
};

// Of the block; v is written for the first term, and added to for others.
template <typename Real>
SumsBetween<Real> add_terms(const Term& t, const BlockBetween<Real>& block, Real* v, bool first) {
  switch (t.kind) {
    case kForwardKL:
      return add_terms(ForwardKL(), block, t.weight, v, first);
    case kReverseKL:
      return add_terms(ReverseKL(), block, t.weight, v, first);
    case kJensenShannon:
      return add_terms(JensenShannon(t.parameter), block, t.weight, v, first);
    case kSkewForwardKL:
      return add_terms(SkewForwardKL(t.parameter), block, t.weight, v, first);
    case kSkewReverseKL:
      return add_terms(SkewReverseKL(t.parameter), block, t.weight, v, first);
    case kTotalVariation:
      return add_terms(TotalVariation(), block, t.weight, v, first);
    case kAlphaDivergence:
      return add_terms(AlphaDivergence(t.parameter, t.norm), block, t.weight, v, first);
    case kCorrelation:
      return add_terms(Correlation(t.parameter, t.norm, t.shift, t.inverse_sum), block, t.weight, v,
                       first);
    case kAgreement:
      return add_terms(Agreement(t.norm, t.shift, t.inverse_sum), block, t.weight, v, first);
    case kEntropyGap:
      return add_terms(EntropyGap(t.norm, t.shift), block, t.weight, v, first);
    default:
      return add_terms(Renyi(t.parameter, t.norm, t.shift, t.inverse_sum), block, t.weight, v,
                       first);
  }
}

// Where a class that only one of the two has mass on makes it infinite.
inline bool is_infinite(const Term& t, bool student_masked, bool teacher_masked) {
  const bool powers = t.kind == kAlphaDivergence || t.kind == kRenyi;
  if (t.kind == kForwardKL || (powers && t.parameter > 1)) return student_masked;
  if (t.kind == kReverseKL || (powers && t.parameter < 0)) return teacher_masked;
  return false;
}

template <typename Real>
struct RowBetween {
  const KdProblem& p;
  int64_t row;
  const Sums<Real>& sums;
  const Real* es;
  const Scratch<Real>& scratch;

  // All blocks of the row, added to v.
  template <typename Add>
  void each_block(Add add, bool measured = true) const {
    const double constant = log(sums.teacher / sums.student);
    for (int64_t first = 0, b = 0; first < p.classes; first += kBlock, ++b) {
      const int64_t n = p.classes - first < kBlock ? p.classes - first : kBlock;
      if (measured) measure(p, sums, row, first, n, scratch.distance, scratch.exponent);
      const Step step = step_to(p, sums, scratch, b);
      const bool saw_max = scratch.student_max[b] == sums.student_max;
      add(first, BlockBetween<Real>{es + first, scratch.teacher + first, scratch.distance,
                                    scratch.exponent, n, (Real)(step.student / sums.student),
                                    (Real)(step.teacher / sums.teacher), (Real)constant,
                                    (Real)(saw_max ? 1 : 2)});
    }
  }

  Between all() const {
    Between between = {0, 0, 1, 0, 0, 0, false};
    Term terms[kMaxTerms];
    SumsBetween<Real> of[kMaxTerms];
    int count = 0;
    for (int k = 0; k < p.terms; ++k)
      if (const Term t = term_of(p.term[k], row); t.weight != 0) terms[count++] = t;
    for (int k = 0; k < count; ++k) prepare(terms[k], count == 1);
    if (count == 0) memset(scratch.v, 0, p.classes * sizeof(Real));
    each_block(
        [&](int64_t first, const BlockBetween<Real>& block) {
          for (int k = 0; k < count; ++k) {
            const SumsBetween<Real> s = add_terms(terms[k], block, scratch.v + first, k == 0);
            of[k].value += s.value, of[k].v += s.v, of[k].constant += s.constant;
            between.off += s.off, between.off_at_max += s.off_at_max;
          }
        },
        count == 0 || count > 1 || needs_distances(terms[0]));
    for (int k = 0; k < count; ++k) {
      between.loss += p.soft_factor * terms[k].weight * value_of_term(terms[k], of[k]);
      between.loss_off += fabs(terms[k].weight) * loss_off(terms[k]);
      between.mean += terms[k].weight * of[k].v;
      const bool logarithm = terms[k].kind == kRenyi || terms[k].kind == kAgreement;
      between.vanished |= logarithm && of[k].value == 0;
    }
    if (count == 1 && terms[0].kind == kRenyi) between.factor = 1 / of[0].value;
    return between;
  }

  // What the powers need of the row. Renyi's v is to be divided by the sum of the powers: at once
  // where others are added to it, afterwards where it is alone.
  void prepare(Term& t, bool alone) const {
    if (t.kind == kCorrelation) return prepare_correlation(t);
    if (t.kind == kEntropyGap) return prepare_entropy_gap(t);
    if (t.kind == kAgreement) return prepare_agreement(t);
    if (t.kind != kAlphaDivergence && t.kind != kRenyi) return;
    // exp(-a log Z_t - (1 - a) log Z_s), which exponent and distance leave out.
    const double a = t.parameter;
    t.norm = exp(-a * log(sums.teacher) - (1 - a) * log(sums.student));
    if (t.kind != kRenyi) return;
    if (sizeof(Real) == 8) t.shift = largest_power(a, 1);
    if (alone) return;
    double sum = 0;
    each_block([&](int64_t first, const BlockBetween<Real>& block) {
      sum += add_terms(t, block, scratch.v + first, true).value;
    });
    t.inverse_sum = 1 / sum;
  }

  // The largest exponent of the powers. Distributions far apart have no other: in float32 their sum
  // is 0, which is not good enough, and then this is asked for.
  double largest_power(double of_distance, double of_exponent) const {
    double largest = -INFINITY;
    each_block([&](int64_t, const BlockBetween<Real>& block) {
      for (int64_t i = 0; i < block.n; ++i) {
        const double power = of_exponent * block.exponent[i] - of_distance * block.distance[i];
        if (power > largest) largest = power;
      }
    });
    return largest;
  }

  // Whether it looks at more than the probabilities.
  static bool needs_distances(const Term& t) {
    return t.kind != kCorrelation && (t.kind != kAgreement || sizeof(Real) == 8);
  }

  // Sums over all classes of fn(p, q, log p, log q), the logarithms but for a constant.
  template <int N, typename Fn>
  void sum(double (&sums)[N], bool measured, Fn fn) const {
    WideSum<Real> wide[N];
    each_block(
        [&](int64_t, const BlockBetween<Real>& block) {
          each<Real>(block.n, [&](int64_t i, auto part) __attribute__((always_inline)) {
            const Real none = 0;
            const Vec<Real> log_q = part.get(block.exponent + i, none);
            Vec<Real> values[N];
            fn(values, part.get(block.et + i, none) * block.to_p,
               part.get(block.es + i, none) * block.to_q,
               log_q - part.get(block.distance + i, none), log_q);
            for (int k = 0; k < N; ++k) wide[k].add(part.keep(values[k]));
          });
        },
        measured);
    for (int k = 0; k < N; ++k) sums[k] = wide[k].total();
  }

  void prepare_agreement(Term& t) const {
    t.norm = 1 / (sums.teacher * sums.student);
    double total[1] = {};
    if (sizeof(Real) == 8) {
      t.shift = largest_power(1, 2);
      each_block([&](int64_t first, const BlockBetween<Real>& block) {
        total[0] += add_terms(t, block, scratch.v + first, true).value;
      });
    } else {
      sum(total, false,
          [](auto& values, auto of_p, auto of_q, auto, auto) { values[0] = of_p * of_q; });
      if (total[0] < 0x1p-80) total[0] = 0;  // products that were too small are missing
    }
    t.inverse_sum = 1 / total[0];
  }

  void prepare_entropy_gap(Term& t) const {
    double of[2] = {};
    sum(of, true, [](auto& values, auto of_p, auto of_q, auto log_p, auto log_q) {
      values[0] = of_p * log_p, values[1] = of_q * log_q;
    });
    const double teacher = log(sums.teacher) - of[0], student = log(sums.student) - of[1];
    t.norm = teacher - student;
    t.shift = 4 * (teacher + student + 1);
  }

  void prepare_correlation(Term& t) const {
    const double mean = 1.0 / (double)p.classes;
    double of[3] = {};
    sum(of, false, [mean](auto& values, auto of_p, auto of_q, auto, auto) {
      const auto a = of_p - (Real)mean, b = of_q - (Real)mean;
      values[0] = a * a, values[1] = b * b, values[2] = a * b;
    });
    const bool constant = !(of[0] > 1e-24 && of[1] > 1e-24);
    t.parameter = mean;
    t.norm = constant ? 0 : 1 / sqrt(of[0]);
    t.shift = constant ? 0 : 1 / sqrt(of[1]);
    t.inverse_sum = 1 - of[2] * t.norm * t.shift;
  }

  // A sum of powers is off by a rounding of 1, which these multiply.
  static double loss_off(const Term& t) {
    const double a = t.parameter;
    if (t.kind == kAlphaDivergence) return 1 / fabs(a * (a - 1));
    if (t.kind == kAgreement) return 4;
    if (t.kind == kCorrelation)  // of distributions that are nearly uniform little is left
      return 4 + 4 * (sqrt(1 + a * t.norm * t.norm) + sqrt(1 + a * t.shift * t.shift));
    if (t.kind == kEntropyGap) return 1 + 2 * fabs(t.norm) * t.shift;
    return t.kind == kRenyi && fabs(a - 1) < 1 ? 1 / fabs(a - 1) : 1;
  }

  double value_of_term(const Term& t, const SumsBetween<Real>& s) const {
    double value = s.value + s.constant * log(sums.teacher / sums.student);
    if (t.kind == kRenyi) value = (log(s.value) + t.shift) / (t.parameter - 1);
    if (t.kind == kAgreement) value = log(t.inverse_sum) - t.shift;
    if (t.kind == kEntropyGap) value = t.norm * t.norm;
    if (t.kind == kCorrelation && t.norm == 0) value = 1;  // of a constant row
    // They have no class in common.
    const bool logarithm = t.kind == kRenyi || t.kind == kAgreement;
    if (logarithm && value == value && t.shift < -0x1p70) value = INFINITY;
    if (!(sums.student > 0) || !(sums.teacher > 0)) return NAN;  // no distribution
    if (value == value && is_infinite(t, sums.masked, sums.teacher_masked)) return INFINITY;
    return value < 0 ? 0 : value;  // rounding
  }
};
