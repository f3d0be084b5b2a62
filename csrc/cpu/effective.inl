// Logits as the models mean them: biased, scaled, soft-capped, mixed, and several teachers as one.
// They are computed in double and kept relative to their maximum, whose neighbours are all that a
// softmax looks at: so float32 holds them as well as it holds plain logits. Included inside an
// anonymous namespace, after loops.inl.

template <typename Real>
constexpr KdDtype kTypeOf = sizeof(Real) == 8 ? kFloat64 : kFloat32;

// A row that a pass reads: contiguous, and less `shift`.
template <typename Real>
struct Effective {
  const Real* values;
  double shift;
};

// cap * tanh(scale * (x + bias) / cap); without a cap the inside of it.
struct Mapping {
  typedef Vec<double> V;
  double scale, cap;   // 0: no cap
  const double* bias;  // or null

  bool is_identity() const { return scale == 1 && cap == 0 && !bias; }

  template <typename P>
  KD_INLINE V inside(V x, int64_t i, P part) const {
    return scale * (bias ? x + part.get(bias + i, 0.0) : x);
  }
  // e^(-2 |x| / cap).
  KD_INLINE V decay(V x) const { return exp2_any<double>(absolute(x) * (-2 * kLog2E / cap)); }

  template <typename P>
  KD_INLINE V of(V x, int64_t i, P part) const {
    x = inside(x, i, part);
    if (cap == 0) return x;
    const V e = decay(x), value = cap * (1.0 - e) / (1.0 + e);
    return x == -INFINITY ? x : x < 0.0 ? -value : value;
  }
  // Its derivative, of the same x.
  template <typename P>
  KD_INLINE V slope(V x, int64_t i, P part) const {
    const V one = splat(1.0);
    if (cap == 0) return one * scale;
    const V e = decay(inside(x, i, part)), sum = 1.0 + e;
    return scale * 4 * e / (sum * sum);
  }
};

// All logits of a row in double, mapped.
inline void widen(const char* row, KdDtype dtype, int64_t n, const Mapping& mapping, double* out) {
  copy_of(row, dtype, n, out);
  if (mapping.is_identity()) return;
  each<double>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    part.put(out + i, mapping.of(part.get(out + i, 0.0), i, part));
  });
}

// Relative to the largest.
template <typename Real>
Effective<Real> narrowed(const double* wide, int64_t n, Real* values) {
  const double max = highest_of(wide, n), shift = fabs(max) < INFINITY ? max : 0;
  for (int64_t i = 0; i < n; ++i) values[i] = (Real)(wide[i] - shift);
  return {values, shift};
}

// log of the sum of e^(v / T) over a row, in double, a block at a time.
inline double log_sum(const char* row, KdDtype dtype, int64_t classes, double temperature) {
  const double scale = kLog2E / temperature;
  double max = -INFINITY, sum = 0, copy[kBlock];
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t n = classes - first < kBlock ? classes - first : kBlock;
    const Block<double> block = survey(row, dtype, first, n, copy);
    if (block.high > max) {
      if (sum != 0) sum *= exp((max - block.high) / temperature);
      max = block.high;
    }
    const double top = reference_of(max);
    Vec<double> of_block = {};
    each<double>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const Vec<double> x = part.get(block.values + i, (double)-INFINITY) - top;
      of_block += x != x ? x : exp2_any<double>(x * scale);
    });
    sum += total(of_block);
  }
  return reference_of(max) / temperature + log(sum);
}

// The mean and the standard deviation of the logits that are not masked.
struct Spread {
  double origin, mean;  // relative to one of them: their offset is nobody's rounding error
  double deviation, degrees;

  double divisor() const { return deviation + 1e-7; }  // the paper's
};

template <typename Real>
Spread spread_of(const Real* row, int64_t n) {
  typedef Vec<Real> V;
  const Real masked = -INFINITY;
  WideSum<Real> sum, counts, squares;
  Real origin = 0;
  for (int64_t i = 0; i < n && origin == 0; ++i)
    if (row[i] != masked) origin = row[i];
  each<Real>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const V x = part.get(row + i, masked), none = {}, one = splat((Real)1);
    sum.add(x == masked ? none : x - origin);
    counts.add(x == masked ? none : one);
  });
  const double count = counts.total(), relative = count > 0 ? sum.total() / count : 0;
  const Real mean = (Real)relative;
  const double rest = relative - (double)mean;
  each<Real>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const V x = part.get(row + i, masked), none = {}, centred = x - origin - mean;
    squares.add(x == masked ? none : centred * centred);
  });
  const double degrees = count > 1 ? count - 1 : 1;
  const double variance = (squares.total() - count * rest * rest) / degrees;
  return {origin, relative, variance < 0 ? 0 : sqrt(variance), degrees};
}

// The rows of one problem as its passes see them.
template <typename Real>
struct Rows {
  const KdProblem& p;
  int64_t row;
  double *wide, *other;  // [classes] each

  Mapping of_student() const {
    return {p.plan->student_scale, p.plan->softcap, p.plan->student_bias};
  }
  Mapping of_teacher() const {
    return {p.plan->teacher_scale, p.plan->softcap, p.plan->teacher_bias};
  }
  const char* student_row() const {
    return (const char*)p.student + p.student_rows.start(row) * element_size(p.student_dtype);
  }
  const char* teacher_row(int k) const {
    const KdTeacher& t = p.plan->teacher[k];
    return (const char*)t.logits + t.rows.start(row) * element_size(t.dtype);
  }

  Effective<Real> student(Real* values) const {
    if (of_student().is_identity()) return plain(student_row(), p.student_dtype, values);
    widen(student_row(), p.student_dtype, p.classes, of_student(), wide);
    return narrowed(wide, p.classes, values);
  }

  // Whether what a view compares with is several teachers.
  bool is_joint() const { return p.plan->teachers > 1 && p.plan->ensemble != kOfLosses; }
  // Whether teachers are computed with as they lie in memory.
  bool as_they_are() const {
    return of_teacher().is_identity() && p.plan->teacher_share == 1 && !is_joint();
  }
  // How many there are to be compared with.
  int views() const { return is_joint() || p.plan->teachers == 0 ? 1 : p.plan->teachers; }
  double weight_of(int view) const {
    return is_joint() || p.plan->teachers == 0 ? 1 : p.plan->teacher[view].weight;
  }

  // The teacher of a view, as a pass is to divide it by `temperature`, which means of probabilities
  // depend on; `divisor`, if any: standardised, and times that.
  Effective<Real> teacher(int view, double temperature, double divisor, Real* values) const {
    if (as_they_are() && divisor == 0)
      return plain(teacher_row(view), p.plan->teacher[view].dtype, values);
    double* const made = is_joint() ? other : wide;
    if (!is_joint()) {
      load_teacher(view, wide);
    } else if (p.plan->ensemble == kOfLogits) {
      mean_of_logits();
    } else {
      mean_of_probabilities(divisor == 0 ? temperature : temperature * divisor, divisor);
      divisor = 0;
    }
    if (divisor != 0) standardize(made, divisor);
    return narrowed(made, p.classes, values);
  }

 private:
  // A row as it lies in memory, copied if it is of another type.
  Effective<Real> plain(const char* from, KdDtype dtype, Real* values) const {
    if (dtype == kTypeOf<Real>) return {(const Real*)from, 0};
    copy_of(from, dtype, p.classes, values);
    return {values, 0};
  }

  void standardize(double* logits, double divisor) const {
    const double own = spread_of(logits, p.classes).divisor(), top = highest_of(logits, p.classes);
    const double max = reference_of(top);
    each<double>(p.classes, [&](int64_t i, auto part) __attribute__((always_inline)) {
      part.put(logits + i, (part.get(logits + i, (double)-INFINITY) - max) * (divisor / own));
    });
  }

  void load_teacher(int k, double* out) const {
    widen(teacher_row(k), p.plan->teacher[k].dtype, p.classes, of_teacher(), out);
    if (p.plan->teacher_share < 1) mix(out);
  }

  // TAID's teacher, between the student as it is now and the teacher.
  void mix(double* teacher) const {
    const double share = p.plan->teacher_share;
    const Mapping mapping = of_student();
    const char* const student = student_row();
    for (int64_t first = 0; first < p.classes; first += kBlock) {
      const int64_t n = p.classes - first < kBlock ? p.classes - first : kBlock;
      double block[kBlock];
      const double* const s = survey(student, p.student_dtype, first, n, block).values;
      each<double>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
        const Vec<double> x = mapping.of(part.get(s + i, 0.0), first + i, part);
        double* const at = teacher + first + i;
        part.put(at, share == 0 ? x : (1 - share) * x + share * part.get(at, 0.0));
      });
    }
  }

  void mean_of_logits() const {
    memset(other, 0, p.classes * sizeof *other);
    for (int k = 0; k < p.plan->teachers; ++k) {
      load_teacher(k, wide);
      const double weight = p.plan->teacher[k].weight;
      each<double>(p.classes, [&](int64_t i, auto part) __attribute__((always_inline)) {
        part.put(other + i, part.get(other + i, 0.0) + weight * part.get(wide + i, 0.0));
      });
    }
  }

  // T log of the mean, for a pass to divide by T. In `other`.
  void mean_of_probabilities(double temperature, double divisor) const {
    for (int k = 0; k < p.plan->teachers; ++k) {
      load_teacher(k, wide);
      if (divisor != 0) standardize(wide, divisor);
      const double all = log_sum((const char*)wide, kFloat64, p.classes, temperature) -
                         log(p.plan->teacher[k].weight);
      each<double>(p.classes, [&](int64_t i, auto part) __attribute__((always_inline)) {
        const Vec<double> x = part.get(wide + i, 0.0) / temperature - all;
        part.put(other + i, k == 0 ? x : log_of_sum(part.get(other + i, 0.0), x));
      });
    }
    multiply(other, temperature, p.classes);
  }

  static KD_INLINE Vec<double> log_of_sum(Vec<double> a, Vec<double> b) {
    const Vec<double> max = a > b ? a : b, min = a > b ? b : a;
    const Vec<double> ratio = exp2_any<double>((min - max) * kLog2E);
    // Both masked, or a NaN, which has no order.
    return max == -INFINITY || a != a || b != b ? a + b : max + natural_log(1.0 + ratio);
  }
};
