// The two sweeps over a row: sweep 1 collects its statistics and leaves the exponentials behind,
// sweep 2 turns them into the gradient. Included inside an anonymous namespace, after vectors.inl.

constexpr double kLog2E = 1.4426950408889634074;
// The lowest number stands for -inf once the maximum is subtracted: times a probability of 0 it is
// 0 and not NaN.
inline float lowest_number(float) { return -0x1.fffffep127f; }
inline double lowest_number(double) { return -0x1.fffffffffffffp1023; }

// How the cross entropy's e^s is had from the divergence's e^(s/T): not at all, by raising it to
// the integer power T, or by an exponential of its own.
enum Power : int { kNoCrossEntropy = 0, kOwnExponential = -1 };

template <typename Real>
struct Scratch {
  Real *student, *teacher, *hard;   // [C] exponentials; [kBlock] where no gradient is asked for
  Real *student_max, *teacher_max;  // [blocks] the maxima each block's exponentials refer to
};

// A block of a row as Real: the row itself, or `scratch` filled with the converted values.
template <typename Real>
inline const Real* load_block(const void* row, KdDtype dtype, int64_t first, int64_t n,
                              Real* scratch) {
  switch (dtype) {
    case kFloat32:
      if (sizeof(Real) == 4) return (const Real*)row + first;
      convert_in<float>((const float*)row + first, n, scratch);
      break;
    case kBFloat16:
      convert_in<BFloat16>((const uint16_t*)row + first, n, scratch);
      break;
    case kFloat16:
      convert_in<Float16>((const uint16_t*)row + first, n, scratch);
      break;
    case kFloat64:
      if (sizeof(Real) == 8) return (const Real*)row + first;
      convert_in<double>((const double*)row + first, n, scratch);
      break;
  }
  return scratch;
}

template <typename Real>
inline Real load_one(const void* row, KdDtype dtype, int64_t i) {
  Real buffer = 0;
  return *load_block<Real>(row, dtype, i, 1, &buffer);
}

template <typename Real>
inline void store_block(const Real* values, int64_t n, KdDtype dtype, void* row, int64_t first) {
  switch (dtype) {
    case kFloat32:
      convert_out<float>(values, n, (float*)row + first);
      break;
    case kBFloat16:
      convert_out<BFloat16>(values, n, (uint16_t*)row + first);
      break;
    case kFloat16:
      convert_out<Float16>(values, n, (uint16_t*)row + first);
      break;
    case kFloat64:
      convert_out<double>(values, n, (double*)row + first);
      break;
  }
}

template <typename Real>
struct Extremes {
  Real student_max, student_min, teacher_max;
};

template <typename Real>
Extremes<Real> extremes(const Real* s, const Real* t, int64_t n) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  const Real inf = INFINITY;
  V high = splat<Real>(-inf), low = splat<Real>(inf), teacher = splat<Real>(-inf);
  auto step = [&](V x, V y) __attribute__((always_inline)) {
    high = x > high ? x : high;
    low = x < low ? x : low;
    teacher = y > teacher ? y : teacher;
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) step(load(s + i), load(t + i));
  const Real none = NAN;  // compares neither way
  if (i < n) step(load_part(s + i, n - i, none), load_part(t + i, n - i, none));
  return {highest<Real>(high), lowest<Real>(low), highest<Real>(teacher)};
}

template <int P, typename V>
KD_INLINE V power(V x) {
  if (P == 1) return x;
  if (P == 2) return x * x;
  if (P == 3) return x * x * x;
  V square = x * x;
  return square * square;
}

// The block's exponentials, and their sums added to `sums`. Vectors are summed in Real before they
// are widened: four where that error is below the exponentials' own, but only two of the sums whose
// logarithm T^2 multiplies. One of these may be 1, and it would be rounded again with each of
// three.
template <typename Real, int P, bool kStore>
void exponentials(const Real* s, const Real* t, int64_t n, double inverse_t, Sums<Real>& sums,
                  Real* out_s, Real* out_t, Real* out_hard) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  const Exponent<Real> soft_exponent(kLog2E * inverse_t), hard_exponent(kLog2E);
  const V student_max = splat<Real>(reference_of(sums.student_max));
  const V teacher_max = splat<Real>(reference_of(sums.teacher_max));
  const V masked = splat<Real>(lowest_number(Real()));
  WideVec<Real> student = {}, teacher = {}, cross = {}, hard = {};
  struct Two {
    V student = {}, teacher = {};
  };
  struct Four {
    V cross = {}, hard = {};
  };

  V es, et, e1;
  auto step = [&](V x, V y, Two& two, Four& four) __attribute__((always_inline)) {
    V ds = at_least(x - student_max, masked);
    V dt = at_least(y - teacher_max, masked);
    es = exp2_scaled(ds, soft_exponent);
    et = exp2_scaled(dt, soft_exponent);
    two.student += es;
    two.teacher += et;
    four.cross += et * (dt - ds);
    if (P == kNoCrossEntropy) return;
    e1 = P == kOwnExponential ? exp2_scaled(ds, hard_exponent) : power<P>(es);
    four.hard += e1;
  };
  auto whole = [&](int64_t i, Two& two, Four& four) __attribute__((always_inline)) {
    step(load(s + i), load(t + i), two, four);
    if (kStore) store(out_s + i, es);
    if (kStore) store(out_t + i, et);
    if (kStore && P == kOwnExponential) store(out_hard + i, e1);
  };
  auto add_two = [&](const Two& two) __attribute__((always_inline)) {
    student += widen(two.student);
    teacher += widen(two.teacher);
  };
  auto add_four = [&](const Four& four) __attribute__((always_inline)) {
    cross += widen(four.cross);
    if (P != kNoCrossEntropy) hard += widen(four.hard);
  };

  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    Two first, second;
    Four four;
    whole(i, first, four);
    whole(i + L, first, four);
    add_two(first);
    whole(i + 2 * L, second, four);
    whole(i + 3 * L, second, four);
    add_two(second);
    add_four(four);
  }
  Four four;  // what is left is less than four vectors
  for (; i < n; i += L) {
    Two two;
    if (const int64_t left = n - i; left >= L) {
      whole(i, two, four);
    } else {
      const Real none = -INFINITY;
      step(load_part(s + i, left, none), load_part(t + i, left, none), two, four);
      if (kStore) store_part(out_s + i, left, es);
      if (kStore) store_part(out_t + i, left, et);
      if (kStore && P == kOwnExponential) store_part(out_hard + i, left, e1);
    }
    add_two(two);
  }
  add_four(four);
  sums.student += total(student);
  sums.teacher += total(teacher);
  sums.cross += total(cross);
  sums.hard += total(hard);
}

template <typename Real, int P, bool kStore>
Sums<Real> sweep1(const KdProblem& p, const void* student, const void* teacher, Real* out_s,
                  const Scratch<Real>& scratch) {
  Sums<Real> sums = {(Real)-INFINITY, (Real)-INFINITY, 0, 0, 0, 0, 0, false};
  const double inverse_t = 1.0 / p.temperature;
  const bool smoothing = P != kNoCrossEntropy && p.label_smoothing > 0;
  for (int64_t first = 0, b = 0; first < p.classes; first += kBlock, ++b) {
    const int64_t n = p.classes - first < kBlock ? p.classes - first : kBlock;
    const int64_t at = kStore ? first : 0;
    const Real* s = load_block<Real>(student, p.student_dtype, first, n, scratch.student + at);
    const Real* t = load_block<Real>(teacher, p.teacher_dtype, first, n, scratch.teacher + at);
    const Extremes<Real> e = extremes(s, t, n);
    if (e.student_min == -INFINITY)
      for (int64_t i = 0; i < n; ++i) sums.masked |= s[i] == -INFINITY && t[i] > -INFINITY;
    if (smoothing)
      for (int64_t i = 0; i < n; ++i)
        sums.smooth += p.weight ? p.weight[first + i] * s[i] : (double)s[i];
    raise_maxima(sums, e.student_max, e.teacher_max, inverse_t);
    exponentials<Real, P, kStore>(s, t, n, inverse_t, sums, out_s + at, scratch.teacher + at,
                                  scratch.hard + at);
    if (kStore) {
      scratch.student_max[b] = sums.student_max;
      scratch.teacher_max[b] = sums.teacher_max;
    }
  }
  return sums;
}

// From the maxima that block b's exponentials refer to, to the row's.
struct Step {
  double student, teacher, hard;
};

template <typename Real>
inline Step step_to(const KdProblem& p, const Sums<Real>& sums, const Scratch<Real>& scratch,
                    int64_t b) {
  const double inverse_t = 1.0 / p.temperature;
  const double ds = (double)scratch.student_max[b] - sums.student_max;
  const double dt = (double)scratch.teacher_max[b] - sums.teacher_max;
  Step step = {1, 1, 1};
  if (ds != 0) step.student = exp(ds * inverse_t), step.hard = exp(ds);
  if (dt != 0) step.teacher = exp(dt * inverse_t);
  return step;
}

// One block of gradient, left in `es`; returns the sum of its squares.
template <typename Real, int P>
double gradient_block(Real* es, const Real* et, const Real* e1, int64_t n, double student,
                      double teacher, double hard, double constant) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  const V a = splat<Real>((Real)student), b = splat<Real>((Real)teacher);
  const V c = splat<Real>((Real)hard), d = splat<Real>((Real)constant);
  V squares = {};
  auto step = [&](V x, V y, V z) __attribute__((always_inline)) {
    V g = rounded(a * x) - rounded(b * y);
    if (P != kNoCrossEntropy) g += c * (P == kOwnExponential ? z : power<P>(x)) - d;
    return g;
  };
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + L <= n; i += L) {
    const V z = P == kOwnExponential ? load(e1 + i) : V{};
    const V g = step(load(es + i), load(et + i), z);
    store(es + i, g);
    squares += g * g;
  }
  if (const int64_t left = n - i) {
    const Real zero = 0;
    const V z = P == kOwnExponential ? load_part(e1 + i, left, zero) : V{};
    store_part(es + i, left, step(load_part(es + i, left, zero), load_part(et + i, left, zero), z));
    const V g = load_part(es + i, left, zero);  // the lanes beyond hold -d
    squares += g * g;
  }
  return total(widen(squares));
}

// The gradient row, and the sum of its squares. It goes to `grad` at once, or stays in `es` for
// later (`deferred`): in place, the student's row is not to be lost before its gradient is good.
template <typename Real, int P>
double sweep2(const KdProblem& p, const Sums<Real>& sums, const Factors& f, Real* es,
              const Scratch<Real>& scratch, char* grad, bool deferred) {
  // Without a soft term the teacher must not be touched: 0 * NaN.
  const Real* et = f.student == 0 && f.teacher == 0 ? es : scratch.teacher;
  double squares = 0;
  for (int64_t first = 0, b = 0; first < p.classes; first += kBlock, ++b) {
    const int64_t n = p.classes - first < kBlock ? p.classes - first : kBlock;
    const Step step = step_to(p, sums, scratch, b);
    const double q = f.student * step.student;
    const double t = f.teacher == 0 ? 0 : f.teacher * step.teacher;
    const double constant = p.weight ? 0.0 : -f.smooth;
    double block = gradient_block<Real, P>(es + first, et + first, scratch.hard + first, n, q, t,
                                           f.hard * step.hard, constant);
    if (P != kNoCrossEntropy && p.weight && f.smooth != 0) {
      block = 0;
      for (int64_t i = first; i < first + n; ++i) {
        es[i] += (Real)(f.smooth * p.weight[i]);
        block += (double)es[i] * es[i];
      }
    }
    squares += block;
    if (!deferred && (char*)es != grad) store_block(es + first, n, p.student_dtype, grad, first);
  }
  return squares;
}

// An entry of the gradient that cancels in the row's arithmetic and is summed on its own, in
// double.
struct Entry {
  int64_t index;  // -1: no such entry
  double gradient;
};

// The label's: r_y - 1 cancels.
template <typename Real, int P>
Entry label_entry(const KdProblem& p, const Sums<Real>& sums, const Factors& f, const Real* es,
                  const Scratch<Real>& scratch, int64_t label) {
  if (P == kNoCrossEntropy) return {-1, 0};
  const Step step = step_to(p, sums, scratch, label / kBlock);
  const double x = es[label];
  const double z = P == kOwnExponential ? (double)scratch.hard[label] : (double)power<P>(x);
  const double w = p.weight ? p.weight[label] : 1.0;
  double gradient = f.hard * step.hard * z - f.label + f.smooth * w;
  if (f.teacher != 0)
    gradient += f.student * step.student * x - f.teacher * step.teacher * scratch.teacher[label];
  return {label, gradient};
}

// Sums over a block of all but the student's maximum. Its exponential is exactly 1 in the blocks
// that saw it, and at no other class, or the sum that is below 1.5 would be 2: that of e^s if
// `by_hard`, as at very high temperatures every e^(s/T) rounds to 1, else that of e^(s/T).
template <typename Real>
struct Others {
  double student = 0, teacher = 0, hard = 0;
  int64_t maximum = -1;  // index of the class left out
};

template <typename Real, int P>
Others<Real> sum_others(const Real* es, const Real* et, const Real* e1, int64_t n, bool saw_max,
                        bool by_hard) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  const V maximum = splat<Real>(saw_max ? 1 : 2);
  WideVec<Real> student = {}, teacher = {}, hard = {};
  Others<Real> others;
  auto step = [&](V x, V y, V z, int64_t first) __attribute__((always_inline)) {
    const auto left_out = (P == kOwnExponential && by_hard ? z : x) == maximum;
    if (any(left_out))
      for (int lane = 0; lane < L; ++lane)
        if (left_out[lane]) others.maximum = first + lane;
    student += widen(left_out ? V{} : x);
    teacher += widen(left_out ? V{} : y);
    if (P != kNoCrossEntropy)
      hard += widen(left_out ? V{} : P == kOwnExponential ? z : power<P>(x));
  };
  int64_t i = 0;
  for (; i + L <= n; i += L)
    step(load(es + i), load(et + i), P == kOwnExponential ? load(e1 + i) : V{}, i);
  if (const int64_t left = n - i) {
    const Real zero = 0;
    const V z = P == kOwnExponential ? load_part(e1 + i, left, zero) : V{};
    step(load_part(es + i, left, zero), load_part(et + i, left, zero), z, i);
  }
  others.student = total(student), others.teacher = total(teacher), others.hard = total(hard);
  return others;
}

// 1 - q, 1 - p and 1 - r of the class the student is sure of, summed over the other classes.
template <typename Real, int P>
Sure sure_class(const KdProblem& p, const Sums<Real>& sums, const Real* es,
                const Scratch<Real>& scratch) {
  Sure sure = {-1, 0, 0, 0};
  const bool hard = P != kNoCrossEntropy, by_hard = sure_by_hard(sums, hard);
  if (!is_sure(sums, hard)) return sure;
  for (int64_t first = 0, b = 0; first < p.classes; first += kBlock, ++b) {
    const int64_t n = p.classes - first < kBlock ? p.classes - first : kBlock;
    const bool saw_max = scratch.student_max[b] == sums.student_max;
    const Others<Real> others = sum_others<Real, P>(es + first, scratch.teacher + first,
                                                    scratch.hard + first, n, saw_max, by_hard);
    if (others.maximum >= 0) sure.index = first + others.maximum;
    const Step step = step_to(p, sums, scratch, b);
    sure.student += others.student * step.student;
    sure.teacher += others.teacher * step.teacher;
    sure.hard += others.hard * step.hard;
  }
  return sure;  // index -1: NaN
}
