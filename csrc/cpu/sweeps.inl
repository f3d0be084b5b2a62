// The two sweeps over a row: sweep 1 collects its statistics and leaves the exponentials behind,
// sweep 2 turns them into the gradient. Included inside an anonymous namespace, after vectors.inl.

constexpr double kLog2E = 1.4426950408889634074;
// The lowest number stands for -inf once the maximum is subtracted: times a probability of 0 it is
// 0 and not NaN.
inline float lowest_number(float) { return -0x1.fffffep127f; }
inline double lowest_number(double) { return -0x1.fffffffffffffp1023; }

// How the cross entropy's e^s is had from the divergence's e^(s/T): not at all, by raising it to
// the integer power T, or by an exponential of its own.
enum Power : int {
  kOwnExponential = -1,
  kNoCrossEntropy = 0,
  kFirst = 1,
  kSecond = 2,
  kThird = 3,
  kFourth = 4
};

template <typename Real>
struct Scratch {
  Real *student, *teacher, *hard;   // [C] exponentials; [kBlock] where no gradient is asked for
  Real *student_max, *teacher_max;  // [blocks] the maxima each block's exponentials refer to
  Real *v, *distance, *exponent;    // [C], [kBlock], [kBlock]: divergences.inl
};

inline int64_t element_size(KdDtype dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// A block of a row as Real, and its largest and smallest logit.
template <typename Real>
struct Block {
  const Real* values;  // the row itself, or the copy
  Real high, low;
};

// Converted on the way, if need be: what is left in `copy` makes room for its exponentials.
template <typename Real, typename E>
Block<Real> survey(const E* row, int64_t n, Real* copy) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  constexpr bool kCopy = !IsSame<Real, E>::value;
  struct Chain {  // of comparisons; one alone would wait for each of its instructions
    V high = splat<Real>(-INFINITY), low = splat<Real>(INFINITY);
    KD_INLINE void step(V x) {
      high = at_least(high, x);
      low = at_most(low, x);
    }
  };
  constexpr int kChains = 4;
  Chain chains[kChains];
  auto whole = [&](int64_t i, Chain& chain) __attribute__((always_inline)) {
    const V x = Read<Real, E>::at(row + i);
    if (kCopy) store(copy + i, x);
    chain.step(x);
  };
  int64_t i = 0;
  for (; i + kChains * L <= n; i += kChains * L)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) whole(i + k * L, chains[k]);
  for (; i + L <= n; i += L) whole(i, chains[0]);
  if (i < n) {
    if constexpr (kCopy)
      for (int64_t k = i; k < n; ++k) copy[k] = (Real)value_of(row[k]);
    const Real* values;
    if constexpr (kCopy)
      values = copy;
    else
      values = row;
    const Real none = NAN;  // compares neither way
    chains[1].step(load_part(values + i, n - i, none));
  }
#pragma GCC unroll 3
  for (int k = 1; k < kChains; ++k) {
    chains[0].high = at_least(chains[0].high, chains[k].high);
    chains[0].low = at_most(chains[0].low, chains[k].low);
  }
  Block<Real> block = {nullptr, highest<Real>(chains[0].high), lowest<Real>(chains[0].low)};
  if constexpr (kCopy)
    block.values = copy;
  else
    block.values = row;
  return block;
}

template <typename Real>
Block<Real> survey(const char* row, KdDtype dtype, int64_t first, int64_t n, Real* copy) {
  switch (dtype) {
    case kFloat32:
      return survey<Real>((const float*)row + first, n, copy);
    case kBFloat16:
      return survey<Real>((const BFloat16*)row + first, n, copy);
    case kFloat16:
      return survey<Real>((const Float16*)row + first, n, copy);
    default:
      return survey<Real>((const double*)row + first, n, copy);
  }
}

template <typename Real>
inline Real load_one(const void* row, KdDtype dtype, int64_t i) {
  switch (dtype) {
    case kFloat32:
      return (Real)((const float*)row)[i];
    case kBFloat16:
      return (Real)((const BFloat16*)row)[i].value();
    case kFloat16:
      return (Real)((const Float16*)row)[i].value();
    default:
      return (Real)((const double*)row)[i];
  }
}

template <typename Real>
inline void store_block(const Real* values, int64_t n, KdDtype dtype, void* row, int64_t first,
                        bool past_caches) {
  switch (dtype) {
    case kFloat32:
      return convert_out(values, n, (float*)row + first, past_caches);
    case kBFloat16:
      return convert_out(values, n, (BFloat16*)row + first, past_caches);
    case kFloat16:
      return convert_out(values, n, (Float16*)row + first, past_caches);
    case kFloat64:
      return convert_out(values, n, (double*)row + first, past_caches);
  }
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
// What will be read next. It is fetched while the exponentials of this block are computed: left to
// the hardware, the search for the next maxima would wait for memory, and memory for the rest.
struct Ahead {
  const char *student, *teacher;
  int64_t student_width, teacher_width;  // bytes per class

  KD_INLINE void fetch(int64_t classes) {
    const char* const student_end = student + classes * student_width;
    const char* const teacher_end = teacher + classes * teacher_width;
    for (; student < student_end; student += 64) __builtin_prefetch(student);
    for (; teacher < teacher_end; teacher += 64) __builtin_prefetch(teacher);
  }
};

template <typename Real, int P, bool kStore, bool kTwo = false>
void exponentials(const Real* s, const Real* t, int64_t n, const Exponent<Real>& soft_exponent,
                  const Exponent<Real>& teacher_exponent, Sums<Real>& sums, Real* out_s,
                  Real* out_t, Real* out_hard, Ahead& ahead) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  const Exponent<Real> hard_exponent(kLog2E);
  const V student_max = splat<Real>(reference_of(sums.student_max));
  const V teacher_max = splat<Real>(reference_of(sums.teacher_max));
  const V masked = splat<Real>(lowest_number(Real()));
  WideSum<Real> student, teacher, cross, hard;

  // Of N vectors, in place: of the student's logits their exponentials, of the teacher's those.
  auto step = [&](auto& x, auto& y, auto& product, auto& e1) __attribute__((always_inline)) {
    constexpr int N = sizeof x / sizeof x[0];
    V e[2 * N];
#pragma GCC unroll 2
    for (int k = 0; k < N; ++k) {
      e[k] = e1[k] = at_least(x[k] - student_max, masked);
      // Below `least` the teacher's exponential is 0, whatever the distance: times -inf, too.
      e[N + k] = at_least(y[k] - teacher_max, kTwo ? masked : soft_exponent.least);
      product[k] = e[N + k] - e[k];
    }
    kTwo ? exp2_scaled<Real>(e, soft_exponent, teacher_exponent)
         : exp2_scaled<Real>(e, soft_exponent);
    if (P == kOwnExponential) exp2_scaled<Real>(e1, hard_exponent);
#pragma GCC unroll 2
    for (int k = 0; k < N; ++k) {
      x[k] = e[k];
      y[k] = e[N + k];
      // Products are rounded before they are summed: whether they are contracted with the sum is up
      // to each instance, and asking for a gradient must not change the loss.
      product[k] = rounded(product[k] * y[k]);
      if (P > 0) e1[k] = rounded(power<P>(x[k]));
    }
  };
  auto pair = [&](int64_t i, V& products, V& hards) __attribute__((always_inline)) {
    V x[2] = {load(s + i), load(s + i + L)}, y[2] = {load(t + i), load(t + i + L)};
    V product[2], e1[2];
    step(x, y, product, e1);
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      if (kStore) store(out_s + i + k * L, x[k]);
      if (kStore) store(out_t + i + k * L, y[k]);
      if (kStore && P == kOwnExponential) store(out_hard + i + k * L, e1[k]);
    }
    student.add(x[0] + x[1]);
    teacher.add(y[0] + y[1]);
    products = product[0] + product[1];
    hards = e1[0] + e1[1];
  };

  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    V products[2], hards[2];
    ahead.fetch(4 * L);
    pair(i, products[0], hards[0]);
    pair(i + 2 * L, products[1], hards[1]);
    cross.add(products[0] + products[1]);
    if (P != kNoCrossEntropy) hard.add(hards[0] + hards[1]);
  }
  auto add_one = [&](V x, V y, V product, V e1) __attribute__((always_inline)) {
    student.add(x);
    teacher.add(y);
    cross.add(product);
    if (P != kNoCrossEntropy) hard.add(e1);
  };
  for (; i + L <= n; i += L) {
    V x[1] = {load(s + i)}, y[1] = {load(t + i)}, product[1], e1[1];
    step(x, y, product, e1);
    if (kStore) store(out_s + i, x[0]);
    if (kStore) store(out_t + i, y[0]);
    if (kStore && P == kOwnExponential) store(out_hard + i, e1[0]);
    add_one(x[0], y[0], product[0], e1[0]);
  }
  if (const int64_t left = n - i) {
    const Real none = -INFINITY;
    V x[1] = {load_part(s + i, left, none)}, y[1] = {load_part(t + i, left, none)};
    V product[1], e1[1];
    step(x, y, product, e1);
    if (kStore) store_part(out_s + i, left, x[0]);
    if (kStore) store_part(out_t + i, left, y[0]);
    if (kStore && P == kOwnExponential) store_part(out_hard + i, left, e1[0]);
    add_one(x[0], y[0], product[0], e1[0]);
  }
  sums.student += student.total();
  sums.teacher += teacher.total();
  sums.cross += cross.total();
  sums.hard += hard.total();
}

// The block with a class masked, in `copy`.
template <typename Real>
Block<Real> without(const Block<Real>& block, int64_t n, int64_t hole, Real* copy) {
  if (copy != block.values) memcpy(copy, block.values, n * sizeof(Real));
  copy[hole] = NAN;  // compares neither way
  const Block<Real> others = survey((const Real*)copy, n, copy);
  copy[hole] = -INFINITY;
  return {copy, others.high, others.low};
}

// Of the logits from class `first` on, for label smoothing.
template <typename Real>
double weighted_sum(const KdProblem& p, const Real* logits, int64_t first, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i)
    sum += p.weight ? p.weight[first + i] * logits[i] : (double)logits[i];
  return sum;
}

// `kTwo`: two temperatures, or a divergence that asks what the teacher masks, or for a row without
// the class `hole`.
template <typename Real, int P, bool kStore, bool kTwo = false>
Sums<Real> sweep1(const KdProblem& p, int64_t row, Real* out_s, const Scratch<Real>& scratch,
                  int64_t hole) {
  const int64_t student_width = element_size(p.student_dtype);
  const int64_t teacher_width = element_size(p.teacher_dtype);
  const int64_t next = row + 1 < p.rows ? row + 1 : row;
  const auto student_row = [&](int64_t i) {
    return (const char*)p.student + p.student_rows.start(i) * student_width;
  };
  const auto teacher_row = [&](int64_t i) {
    return (const char*)p.teacher + p.teacher_rows.start(i) * teacher_width;
  };
  const char *const student = student_row(row), *const teacher = teacher_row(row);
  Sums<Real> sums = {(Real)-INFINITY, (Real)-INFINITY, 0, 0, 0, 0, 0, false};
  const double inverse_t = 1.0 / p.temperature;
  const Exponent<Real> soft_exponent(kLog2E * inverse_t);
  const double teacher_inverse_t = kTwo ? 1.0 / p.teacher_temperature : inverse_t;
  const Exponent<Real> teacher_exponent(kLog2E * teacher_inverse_t);
  const bool smoothing = P != kNoCrossEntropy && p.label_smoothing > 0;
  for (int64_t first = 0, b = 0; first < p.classes; first += kBlock, ++b) {
    const int64_t n = p.classes - first < kBlock ? p.classes - first : kBlock;
    const int64_t at = kStore ? first : 0;
    const bool last = first + kBlock >= p.classes;
    Ahead ahead = {last ? student_row(next) : student + (first + n) * student_width,
                   last ? teacher_row(next) : teacher + (first + n) * teacher_width, student_width,
                   teacher_width};
    Block<Real> s = survey(student, p.student_dtype, first, n, scratch.student + at);
    Block<Real> t = survey(teacher, p.teacher_dtype, first, n, scratch.teacher + at);
    if (kTwo && hole >= first && hole < first + n) {
      s = without(s, n, hole - first, scratch.student + at);
      t = without(t, n, hole - first, scratch.teacher + at);
    }
    if (s.low == -INFINITY)
      for (int64_t i = 0; i < n; ++i)
        sums.masked |= s.values[i] == -INFINITY && t.values[i] > -INFINITY;
    if (kTwo && t.low == -INFINITY)
      for (int64_t i = 0; i < n; ++i)
        sums.teacher_masked |= t.values[i] == -INFINITY && s.values[i] > -INFINITY;
    if (smoothing) sums.smooth += weighted_sum(p, s.values, first, n);
    raise_maxima(sums, s.high, t.high, inverse_t, teacher_inverse_t);
    exponentials<Real, P, kStore, kTwo>(s.values, t.values, n, soft_exponent, teacher_exponent,
                                        sums, out_s + at, scratch.teacher + at, scratch.hard + at,
                                        ahead);
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
  // Compared as they are: -inf less -inf is no number.
  if (scratch.student_max[b] != sums.student_max)
    step.student = exp(ds * inverse_t), step.hard = exp(ds);
  if (scratch.teacher_max[b] != sums.teacher_max) step.teacher = exp(dt / p.teacher_temperature);
  return step;
}

// One block of gradient; returns the sum of its squares. `kStream`: past the caches.
template <typename Real, int P, bool kStream>
double gradient_block(const Real* es, const Real* et, const Real* e1, int64_t n, double student,
                      double teacher, double hard, double constant, Real* out) {
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
    kStream ? stream(out + i, g) : store(out + i, g);
    squares += g * g;
  }
  if (const int64_t left = n - i) {
    const Real zero = 0;
    const V z = P == kOwnExponential ? load_part(e1 + i, left, zero) : V{};
    const V g = step(load_part(es + i, left, zero), load_part(et + i, left, zero), z);
    store_part(out + i, left, g);
    squares += keep_part(g * g, left);  // the lanes beyond hold -d
  }
  WideSum<Real> sum;
  sum.add(squares);
  return sum.total();
}

// Where a row's exponentials are, and where its gradient goes.
template <typename Real>
struct Place {
  Real* es;     // the student's exponentials
  char* grad;   // the gradient row
  bool direct;  // the gradient is of type Real and goes there at once; else by way of `es`
  bool stream;  // it goes past the caches; then `es` is not the gradient row
  bool later;   // it stays in `es`: in place, the student's row is not to be lost before it is good
};

// The gradient row, and the sum of its squares.
template <typename Real, int P>
double sweep2(const KdProblem& p, const Sums<Real>& sums, const Factors& f,
              const Place<Real>& place, const Scratch<Real>& scratch) {
  Real* const es = place.es;
  // Without a soft term the teacher must not be touched: 0 * NaN.
  const Real* et = f.student == 0 && f.teacher == 0 ? es : scratch.teacher;
  Real* const out = place.direct ? (Real*)place.grad : es;
  double squares = 0;
  for (int64_t first = 0, b = 0; first < p.classes; first += kBlock, ++b) {
    const int64_t n = p.classes - first < kBlock ? p.classes - first : kBlock;
    const Step step = step_to(p, sums, scratch, b);
    const double q = f.student * step.student;
    const double t = f.teacher == 0 ? 0 : f.teacher * step.teacher;
    const double constant = p.weight ? 0.0 : -f.smooth;
    const auto block_of = place.direct && place.stream ? gradient_block<Real, P, true>
                                                       : gradient_block<Real, P, false>;
    double block = block_of(es + first, et + first, scratch.hard + first, n, q, t,
                            f.hard * step.hard, constant, out + first);
    if (P != kNoCrossEntropy && p.weight && f.smooth != 0) {
      block = 0;
      for (int64_t i = first; i < first + n; ++i) {
        out[i] += (Real)(f.smooth * p.weight[i]);
        block += (double)out[i] * out[i];
      }
    }
    squares += block;
    if (!place.direct && !place.later)
      store_block(es + first, n, p.student_dtype, place.grad, first, place.stream);
  }
  return squares;
}

// An entry of the gradient that cancels in the row's arithmetic and is summed on its own, in
// double.
struct Entry {
  int64_t index;  // -1: no such entry
  double gradient;
};

template <typename Real, int P>
Entry label_entry(const KdProblem& p, const Sums<Real>& sums, const Factors& f, const Real* es,
                  const Scratch<Real>& scratch, int64_t label) {
  if (P == kNoCrossEntropy) return {-1, 0};
  const Step step = step_to(p, sums, scratch, label / kBlock);
  const double x = es[label];
  const double z = P == kOwnExponential ? (double)scratch.hard[label] : (double)power<P>(x);
  return {label, label_gradient(f, p.weight ? p.weight[label] : 1.0, step.student * x,
                                step.teacher * scratch.teacher[label], step.hard * z)};
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
  WideSum<Real> student, teacher, hard;
  Others<Real> others;
  auto step = [&](V x, V y, V z, int64_t first) __attribute__((always_inline)) {
    const auto left_out = (P == kOwnExponential && by_hard ? z : x) == maximum;
    if (any(left_out))
      for (int lane = 0; lane < L; ++lane)
        if (left_out[lane]) others.maximum = first + lane;
    student.add(left_out ? V{} : x);
    teacher.add(left_out ? V{} : y);
    if (P != kNoCrossEntropy) hard.add(left_out ? V{} : P == kOwnExponential ? z : power<P>(x));
  };
  int64_t i = 0;
  for (; i + L <= n; i += L)
    step(load(es + i), load(et + i), P == kOwnExponential ? load(e1 + i) : V{}, i);
  if (const int64_t left = n - i) {
    const Real zero = 0;
    const V z = P == kOwnExponential ? load_part(e1 + i, left, zero) : V{};
    step(load_part(es + i, left, zero), load_part(et + i, left, zero), z, i);
  }
  others.student = student.total(), others.teacher = teacher.total(), others.hard = hard.total();
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
