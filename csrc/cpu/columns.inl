// The columns of a batch compared: columns.h. Included inside an anonymous namespace, after
// loops.inl.

// A row of logits.
inline const char* row_at(const void* logits, KdDtype dtype, const KdRows& rows, int64_t row) {
  return (const char*)logits + rows.start(row) * element_size(dtype);
}
inline const char* student_at(const KdColumns& c, int64_t row) {
  return row_at(c.student, c.student_dtype, c.student_rows, row);
}
inline const char* teacher_at(const KdColumns& c, int64_t row) {
  return row_at(c.teacher, c.teacher_dtype, c.teacher_rows, row);
}

// A tile of columns: p and q of the active rows, and numbers of each column.
struct Tile {
  const KdColumns& c;
  int64_t first, n;
  double *p, *q;                                           // [count, width]
  double *p_mean, *q_mean, *p_scale, *q_scale, *distance;  // [width]

  Tile(const KdColumns& c, int64_t index, double* memory) : c(c), first(index * c.width) {
    n = c.classes - first < c.width ? c.classes - first : c.width;
    p = memory, q = p + c.count * c.width;
    p_mean = q + c.count * c.width, q_mean = p_mean + c.width;
    p_scale = q_mean + c.width, q_scale = p_scale + c.width;
    distance = q_scale + c.width;
    memset(p_mean, 0, 5 * c.width * sizeof *p_mean);
  }

  // The tile's rows lie far apart in memory, and nobody but us knows where the next ones are.
  void fetch(const char* row, KdDtype dtype) const {
    const char* const from = row + first * element_size(dtype);
    for (int64_t i = 0; i < n * element_size(dtype); i += 64) __builtin_prefetch(from + i);
  }

  static void probabilities(const double* logits, int64_t n, double temperature, double log_sum,
                            double* out, double* sums) {
    const double scale = kLog2E / temperature, shift = log_sum * kLog2E;
    each<double>(n, [=](int64_t i, auto part) __attribute__((always_inline)) {
      const Vec<double> x = part.get(logits + i, 0.0) * scale - shift;
      const Vec<double> e = x != x ? x : exp2_any<double>(x);
      part.put(out + i, e);
      part.put(sums + i, part.get(sums + i, 0.0) + e);
    });
  }

  void load() const {
    double copy[kMaxWidth];
    for (int64_t row = 0, at = 0; row < c.rows; ++row) {
      if (row + 8 < c.rows) {
        fetch(student_at(c, row + 8), c.student_dtype);
        fetch(teacher_at(c, row + 8), c.teacher_dtype);
      }
      if (!c.active[row]) continue;
      const double* s = survey(student_at(c, row), c.student_dtype, first, n, copy).values;
      probabilities(s, n, c.temperature, c.student_log[row], q + at, q_mean);
      const double* t = survey(teacher_at(c, row), c.teacher_dtype, first, n, copy).values;
      probabilities(t, n, c.teacher_temperature, c.teacher_log[row], p + at, p_mean);
      at += c.width;
    }
    multiply(p_mean, 1.0 / (double)c.count, n);
    multiply(q_mean, 1.0 / (double)c.count, n);
  }

  // Of a row of the tile the centred columns: fn(index, part, p, q).
  template <typename Fn>
  KD_INLINE void centred(int64_t at, Fn fn) const {
    // Copies: what is stored meanwhile could be these pointers, for all that the compiler knows.
    const double *const of_p = p + at, *const of_q = q + at, *const pm = p_mean, *const qm = q_mean;
    each<double>(n, [=](int64_t i, auto part) __attribute__((always_inline)) {
      fn(i, part, part.get(of_p + i, 0.0) - part.get(pm + i, 0.0),
         part.get(of_q + i, 0.0) - part.get(qm + i, 0.0));
    });
  }

  // 1 / the lengths of the centred columns, and 0 of both where one is constant.
  void measure() const {
    double *const of_p = p_scale, *const of_q = q_scale;
    for (int64_t k = 0; k < c.count; ++k)
      centred(k * c.width,
              [=](int64_t i, auto part, auto a, auto b) __attribute__((always_inline)) {
                part.put(of_p + i, part.get(of_p + i, 0.0) + a * a);
                part.put(of_q + i, part.get(of_q + i, 0.0) + b * b);
              });
    for (int64_t i = 0; i < n; ++i) {
      const bool constant = of_p[i] <= 1e-24 || of_q[i] <= 1e-24;
      of_p[i] = constant ? 0 : 1 / sqrt(of_p[i]);
      of_q[i] = constant ? 0 : 1 / sqrt(of_q[i]);
    }
  }

  // Half the squared distance of unit vectors, which does not cancel. A constant column is
  // correlated with nothing.
  void compare() const {
    double* const sums = distance;
    const double *const of_p = p_scale, *const of_q = q_scale;
    for (int64_t k = 0; k < c.count; ++k)
      centred(k * c.width,
              [=](int64_t i, auto part, auto a, auto b) __attribute__((always_inline)) {
                const auto apart = b * part.get(of_q + i, 0.0) - a * part.get(of_p + i, 0.0);
                part.put(sums + i, part.get(sums + i, 0.0) + apart * apart * 0.5);
              });
    for (int64_t i = 0; i < n; ++i) c.distance[first + i] = of_p[i] == 0 ? 1 : sums[i];
  }

  // q times the gradient in q, (b - a - d b) / |q| of unit vectors, in the place of the gradient.
  template <typename Real>
  void leave(Real* grad) const {
    const double scale = c.scale / (double)c.classes;
    const double *const of_p = p_scale, *const of_q = q_scale, *const d = distance;
    double v[kMaxWidth];
    for (int64_t row = 0, at = 0; row < c.rows; ++row) {
      if (!c.active[row]) continue;
      const double* const kept = q + at;
      double* const out = v;
      centred(at, [=](int64_t i, auto part, auto a, auto b) __attribute__((always_inline)) {
        const auto q_scale = part.get(of_q + i, 0.0), unit = b * q_scale;
        const auto in_q = unit - a * part.get(of_p + i, 0.0) - part.get(d + i, 0.0) * unit;
        part.put(out + i, part.get(kept + i, 0.0) * in_q * q_scale * scale);
      });
      Real* const to = grad + row * c.classes + first;
      for (int64_t i = 0; i < n; ++i) to[i] = (Real)v[i];
      at += c.width;
    }
  }
};

// v, in the gradient's place, becomes the gradient in the logits: (v - q sum v) / T.
template <typename Real>
void finish_row(const KdColumns& c, int64_t row, Real* grad) {
  const double inverse = 1 / c.temperature, scale = kLog2E * inverse;
  const double shift = c.student_log[row] * kLog2E;
  double sum = 0;
  for (int64_t first = 0; first < c.classes; first += kBlock) {
    const int64_t n = c.classes - first < kBlock ? c.classes - first : kBlock;
    Vec<double> of_block = {};
    double copy[kBlock];
    const double* const v = survey(grad + first, n, copy).values;
    each<double>(n, [&](int64_t i, auto part)
                        __attribute__((always_inline)) { of_block += part.get(v + i, 0.0); });
    sum += total(of_block);
  }
  for (int64_t first = 0; first < c.classes; first += kBlock) {
    const int64_t n = c.classes - first < kBlock ? c.classes - first : kBlock;
    double copy[kBlock], q[kBlock];
    double* const out = q;
    const double* const s = survey(student_at(c, row), c.student_dtype, first, n, copy).values;
    each<double>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const Vec<double> x = part.get(s + i, 0.0) * scale - shift;
      part.put(out + i, (x != x ? x : exp2_any<double>(x)) * sum);
    });
    for (int64_t i = 0; i < n; ++i) grad[first + i] = (Real)((grad[first + i] - q[i]) * inverse);
  }
}

template <typename Real>
void visit_columns(const KdColumns& c, KdColumnsStep step, int64_t begin, int64_t end,
                   char* scratch) {
  Real* const grad = (Real*)c.grad;
  for (int64_t i = begin; i < end; ++i) {
    if (step == kCompare) {
      const Tile tile(c, i, (double*)scratch);
      tile.load(), tile.measure(), tile.compare();
      if (grad) tile.leave(grad);
    } else if (!c.active[i]) {  // not even read: it may hold NaN
      if (step == kFinish) memset(grad + i * c.classes, 0, c.classes * sizeof(Real));
    } else if (step == kNormalise) {
      c.student_log[i] = log_sum(student_at(c, i), c.student_dtype, c.classes, c.temperature);
      c.teacher_log[i] =
          log_sum(teacher_at(c, i), c.teacher_dtype, c.classes, c.teacher_temperature);
    } else {
      finish_row(c, i, grad + i * c.classes);
    }
  }
}
