// Logits as the models mean them: biased, scaled, soft-capped, mixed, and several teachers as one.
// They are computed in double and kept relative to their maximum, whose neighbours are all that a
// softmax looks at: so float32 holds them as well as it holds plain logits. Included inside an
// anonymous namespace, after sweeps.inl.

// A row that a pass reads: contiguous, and less `shift`.
template <typename Real>
struct Effective {
  Real* values;
  double shift;
};

// cap * tanh(scale * (x + bias) / cap); without a cap the inside of it.
struct Mapping {
  double scale, cap;   // 0: no cap
  const double* bias;  // or null

  bool is_identity() const { return scale == 1 && cap == 0 && !bias; }

  KD_INLINE double of(double x, int64_t i) const {
    x = scale * (bias ? x + bias[i] : x);
    if (cap == 0 || x == -INFINITY) return x;
    const double e = exp(-2 * fabs(x / cap)), value = cap * (1 - e) / (1 + e);
    return x < 0 ? -value : value;
  }
  // Its derivative, of the same x.
  KD_INLINE double slope(double x, int64_t i) const {
    if (cap == 0) return scale;
    x = scale * (bias ? x + bias[i] : x);
    const double e = exp(-2 * fabs(x / cap)), sum = 1 + e;
    return x == -INFINITY ? 0 : scale * 4 * e / (sum * sum);
  }
};

// All logits of a row in double, mapped.
template <typename Real>
void widen(const char* row, KdDtype dtype, int64_t n, const Mapping& mapping, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = mapping.of(load_one<double>(row, dtype, i), i);
}

template <typename Real>
Effective<Real> narrowed(const double* wide, int64_t n, Real* values) {
  double max = -INFINITY;
  for (int64_t i = 0; i < n; ++i)
    if (wide[i] > max) max = wide[i];
  const double shift = fabs(max) < INFINITY ? max : 0;
  for (int64_t i = 0; i < n; ++i) values[i] = (Real)(wide[i] - shift);
  return {values, shift};
}

// log of the sum of e^(v / T) over a row, in double.
inline double log_sum(const double* row, int64_t n, double temperature) {
  double max = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!(row[i] <= max)) max = row[i];
  if (!(fabs(max) < INFINITY)) return max;
  for (int64_t i = 0; i < n; ++i) sum += exp((row[i] - max) / temperature);
  return max / temperature + log(sum);
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
    const Mapping mapping = of_student();
    if (mapping.is_identity()) {
      for (int64_t i = 0; i < p.classes; ++i)
        values[i] = load_one<Real>(student_row(), p.student_dtype, i);
      return {values, 0};
    }
    widen<Real>(student_row(), p.student_dtype, p.classes, mapping, wide);
    return narrowed(wide, p.classes, values);
  }

  // Whether teacher k is computed with as it lies in memory.
  bool as_it_is(int k) const {
    return of_teacher().is_identity() && p.plan->teacher_share == 1 && !is_one(k);
  }
  // Whether what teacher k stands for is several teachers.
  bool is_one(int) const { return p.plan->teachers > 1 && p.plan->ensemble != kOfLosses; }
  // How many there are to be compared with.
  int views() const { return p.plan->ensemble == kOfLosses ? p.plan->teachers : 1; }
  double weight_of(int view) const {
    return p.plan->ensemble == kOfLosses ? p.plan->teacher[view].weight : 1;
  }

  // The teacher of a view at a temperature, which means of probabilities depend on.
  Effective<Real> teacher(int view, double temperature, Real* values) const {
    if (!is_one(view)) {
      load_teacher(view, wide);
      mix(wide);
    } else if (p.plan->ensemble == kOfLogits) {
      for (int64_t i = 0; i < p.classes; ++i) other[i] = 0;
      for (int k = 0; k < p.plan->teachers; ++k) {
        load_teacher(k, wide);
        for (int64_t i = 0; i < p.classes; ++i) other[i] += p.plan->teacher[k].weight * wide[i];
      }
      mix(other);
      return narrowed(other, p.classes, values);
    } else {
      mean_of_probabilities(temperature);
      return narrowed(other, p.classes, values);
    }
    return narrowed(wide, p.classes, values);
  }

 private:
  void load_teacher(int k, double* out) const {
    widen<Real>(teacher_row(k), p.plan->teacher[k].dtype, p.classes, of_teacher(), out);
  }

  // TAID's teacher, between the student as it is now and the teacher.
  void mix(double* teacher) const {
    const double share = p.plan->teacher_share;
    if (share == 1) return;
    const Mapping mapping = of_student();
    const char* const student = student_row();
    for (int64_t i = 0; i < p.classes; ++i) {
      const double s = mapping.of(load_one<double>(student, p.student_dtype, i), i);
      teacher[i] = share == 0 ? s : (1 - share) * s + share * teacher[i];
    }
  }

  // T log of the mean, for a pass to divide by T. In `other`.
  void mean_of_probabilities(double temperature) const {
    for (int k = 0; k < p.plan->teachers; ++k) {
      load_teacher(k, wide);
      mix(wide);
      const double log_weight = log(p.plan->teacher[k].weight);
      const double all = log_sum(wide, p.classes, temperature) - log_weight;
      for (int64_t i = 0; i < p.classes; ++i) {
        const double x = wide[i] / temperature - all;
        const double sum = k == 0 ? x : log_of_sum(other[i], x);
        other[i] = sum;
      }
    }
    for (int64_t i = 0; i < p.classes; ++i) other[i] *= temperature;
  }

  static double log_of_sum(double a, double b) {
    const double max = a > b ? a : b, min = a > b ? b : a;
    if (max == -INFINITY) return a + b;  // both masked, or a NaN
    return max + log1p(exp(min - max));
  }
};
