// Rows of few classes: a row in each lane, class after class. A row by itself would be a vector or
// two of exponentials among a thousand instructions that reduce vectors, and wait. Included inside
// an anonymous namespace, after jobs.inl.

// The rows at hand, and what their lanes have come to beside the group's sums.
struct Narrow {
  // [classes][kRows]: logits, then exponentials, and the gradient in place of the student's.
  float *student, *teacher, *hard;
  alignas(64) float of_q[kRows], of_p[kRows], of_r[kRows];
  alignas(64) float label[kRows], sure[kRows];  // classes, or -1
  alignas(64) float label_entry[kRows], sure_entry[kRows];
};

void copy_in(const KdProblem& p, const Group& group, Narrow& rows) {
  const char *students[kRows], *teachers[kRows];
  const int64_t student_width = element_size(p.student_dtype);
  const int64_t teacher_width = element_size(p.teacher_dtype);
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = group.row[r < group.count ? r : 0];  // no lane is empty
    students[r] = (const char*)p.student + p.student_rows.start(row) * student_width;
    teachers[r] = (const char*)p.teacher + p.teacher_rows.start(row) * teacher_width;
  }
  into_lanes(students, p.student_dtype, p.classes, rows.student);
  into_lanes(teachers, p.teacher_dtype, p.classes, rows.teacher);
}

void copy_out(const KdProblem& p, const Group& group, const Narrow& rows) {
  char* gradients[kRows];
  for (int r = 0; r < kRows; ++r) {
    const bool good = r < group.count && !group.odd[r] && group.good[r] == kAll;
    const int64_t start = good ? p.grad_rows.start(group.row[r]) : 0;
    gradients[r] = good ? (char*)p.grad + start * element_size(p.student_dtype) : nullptr;
  }
  out_of_lanes(rows.student, p.classes, p.student_dtype, gradients);
}

// Lane by lane, a half of the vector at a time.
struct Halves {
  typedef Vec<double> D;
  static KD_INLINE void put(double* lanes, D low, D high) {
    store(lanes, low);
    store(lanes + Lanes<double>::kCount, high);
  }
  static KD_INLINE void put(double* lanes, const WideSum<float>& sum) {
    put(lanes, sum.low, sum.high);
  }
  static KD_INLINE void put(double* lanes, Vec<float> v) { put(lanes, low_half(v), high_half(v)); }
};

// Sums of the logits, weighted, for label smoothing.
inline void add_smoothing(const KdProblem& p, Group& group, const Narrow& rows) {
  Vec<double> low = {}, high = {};
  for (int64_t k = 0; k < p.classes; ++k) {
    const Vec<float> x = load(rows.student + k * kRows);
    const double w = p.weight ? p.weight[k] : 1.0;
    low += w * low_half(x);
    high += w * high_half(x);
  }
  Halves::put(group.smooth, low, high);
}

// Exponentials of one class, for the sums: `es`, `et` and `e1` but for those of the student's
// maximum, and the teacher's at that.
struct ClassStep {
  Vec<float> es, et, e1, at_max, product;
};

// Sums over the classes. Vectors are summed in float32 before they are widened, as in
// exponentials().
template <int P>
void collect(const KdProblem& p, Group& group, Narrow& rows) {
  typedef Vec<float> V;
  float *const student = rows.student, *const teacher = rows.teacher, *const hard = rows.hard;
  const int64_t classes = p.classes;
  V student_max = splat<float>(-INFINITY), teacher_max = student_max;
  for (int64_t k = 0; k < classes; ++k) {
    student_max = at_least(student_max, load(student + k * kRows));
    teacher_max = at_least(teacher_max, load(teacher + k * kRows));
  }
  if (P != kNoCrossEntropy && p.label_smoothing > 0) add_smoothing(p, group, rows);
  const Exponent<float> soft_exponent(kLog2E / p.temperature), hard_exponent(kLog2E);
  WideSum<float> others_student, others_teacher, others_hard, at_max, cross;
  V ones = {}, index = {}, at = {};  // `at`: the class as a number
  // n classes from k on; the sums of those.
  auto step = [&](int64_t k, auto n) __attribute__((always_inline)) {
    constexpr int N = decltype(n)::value;
    V ds[N], e[2 * N], product[N], e1[N];  // `e`: the student's exponentials, then the teacher's
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      e[i] = ds[i] = load(student + (k + i) * kRows) - student_max;
      e[N + i] = load(teacher + (k + i) * kRows) - teacher_max;
      product[i] = e[N + i] - ds[i];
      if (P == kOwnExponential) e1[i] = ds[i];
    }
    exp2_scaled<float>(e, soft_exponent);
    if (P == kOwnExponential) exp2_scaled<float>(e1, hard_exponent);
    ClassStep sum = {};
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i, at += 1.0f) {
      const V es = e[i], et = e[N + i];
      const auto is_max = ds[i] == V{};
      ones += is_max ? splat<float>(1) : V{};
      index = is_max ? at : index;
      store(student + (k + i) * kRows, es);
      store(teacher + (k + i) * kRows, et);
      if (P == kOwnExponential) store(hard + (k + i) * kRows, e1[i]);
      if (P > 0) e1[i] = power<P>(es);
      sum.es += is_max ? V{} : es;
      sum.et += is_max ? V{} : et;
      sum.at_max += is_max ? et : V{};
      sum.product += et * product[i];
      if (P != kNoCrossEntropy) sum.e1 += is_max ? V{} : e1[i];
    }
    others_student.add(sum.es);
    others_teacher.add(sum.et);
    at_max.add(sum.at_max);
    cross.add(sum.product);
    if (P != kNoCrossEntropy) others_hard.add(sum.e1);
  };
  int64_t k = 0;
  for (; k + 2 <= classes; k += 2) step(k, std::integral_constant<int, 2>());
  if (k < classes) step(k, std::integral_constant<int, 1>());
  const Vec<double> low = low_half(ones), high = high_half(ones);
  Halves::put(group.others_student, others_student);
  Halves::put(group.others_teacher, others_teacher);
  Halves::put(group.others_hard, others_hard);
  Halves::put(group.student, others_student.low + low, others_student.high + high);
  Halves::put(group.teacher, others_teacher.low + at_max.low, others_teacher.high + at_max.high);
  Halves::put(group.hard, others_hard.low + low, others_hard.high + high);
  Halves::put(group.cross, cross);
  Halves::put(group.max, student_max);
  Halves::put(group.sure, index);
  // Whatever is no number or infinite leaves that in the product with the other's exponential.
  for (int r = 0; r < group.count; ++r) {
    const double all = group.student[r] + group.teacher[r] + group.cross[r] + group.hard[r];
    group.odd[r] = !(all - all == 0);
  }
}

// The exponentials at the labels, and whether the class of the maximum is one the student is sure
// of.
template <int P>
void look_up(const KdProblem& p, Group& group, const Narrow& rows) {
  const bool hard = P != kNoCrossEntropy;
  for (int r = 0; r < group.count; ++r) {
    if (hard) {
      const int64_t at = group.label[r] * kRows + r;
      const float x = rows.student[at];
      group.label_student[r] = x;
      group.label_teacher[r] = rows.teacher[at];
      group.label_hard[r] = P == kOwnExponential ? rows.hard[at] : power<P>(x);
      group.on_label[r] = group.sure[r] == (double)group.label[r];
    }
    group.sure_weight[r] = p.weight ? p.weight[(int64_t)group.sure[r]] : 1.0;
    const bool sure = group.student[r] < 1.5 || (hard && group.hard[r] < 1.5);
    if (!sure) group.sure[r] = -1;
  }
}

// The numbers of the gradient in float32. Of a row that is left out nothing is written later on.
inline void prepare(const Group& group, bool hard, Narrow& rows) {
  for (int r = 0; r < kRows; ++r) {
    rows.of_q[r] = (float)group.of_q[r];
    rows.of_p[r] = (float)group.of_p[r];
    rows.of_r[r] = (float)group.of_r[r];
    rows.label[r] = hard ? (float)group.label[r] : -1;
    rows.sure[r] = (float)group.sure[r];
    rows.label_entry[r] = (float)group.label_entry[r];
    rows.sure_entry[r] = (float)group.sure_entry[r];
  }
}

template <int P>
void gradients(const KdProblem& p, Group& group, Narrow& rows) {
  typedef Vec<float> V;
  float *const student = rows.student, *const teacher = rows.teacher, *const hard = rows.hard;
  const V a = load(rows.of_q), b = load(rows.of_p), c = load(rows.of_r);
  const V label = load(rows.label), sure = load(rows.sure);
  const V label_entry = load(rows.label_entry), sure_entry = load(rows.sure_entry);
  V squares = {}, at = {};
  const int64_t classes = p.classes;
  for (int64_t k = 0; k < classes; ++k, at += 1.0f) {
    const V x = load(student + k * kRows), y = load(teacher + k * kRows);
    V g = rounded(a * x) - rounded(b * y);
    if (P != kNoCrossEntropy) {
      const V z = P == kOwnExponential ? load(hard + k * kRows) : power<P>(x);
      g += c * z + splat((float)(group.of_smooth * (p.weight ? p.weight[k] : 1.0)));
    }
    g = label == at ? label_entry : g;
    g = sure == at ? sure_entry : g;
    squares += g * g;
    store(student + k * kRows, g);
  }
  Halves::put(group.squares, squares);
}

struct NarrowSteps {
  void (*collect)(const KdProblem&, Group&, Narrow&);
  void (*look_up)(const KdProblem&, Group&, const Narrow&);
  void (*gradients)(const KdProblem&, Group&, Narrow&);
};
template <int P>
constexpr NarrowSteps kNarrowSteps = {collect<P>, look_up<P>, gradients<P>};

inline const NarrowSteps& narrow_steps_of(Power power) {
  switch (power) {
    case kNoCrossEntropy:
      return kNarrowSteps<kNoCrossEntropy>;
    case kFirst:
      return kNarrowSteps<kFirst>;
    case kSecond:
      return kNarrowSteps<kSecond>;
    case kThird:
      return kNarrowSteps<kThird>;
    case kFourth:
      return kNarrowSteps<kFourth>;
    default:
      return kNarrowSteps<kOwnExponential>;
  }
}

void visit_narrow(const KdProblem& p, Group& group, char* memory) {
  Narrow rows;
  rows.student = (float*)memory;
  rows.teacher = rows.student + kNarrow * kRows;
  rows.hard = rows.teacher + kNarrow * kRows;
  copy_in(p, group, rows);
  look_up_labels(p, group);
  if (group.power != kNoCrossEntropy)
    for (int r = 0; r < group.count; ++r)
      group.at_label[r] = rows.student[group.label[r] * kRows + r];
  narrow_steps_of(group.power).collect(p, group, rows);
  conclude(p, group);
  if (!p.grad) return;
  const Power power = group.gradient_power(p);
  narrow_steps_of(power).look_up(p, group, rows);
  single_out(p, group);
  prepare(group, power != kNoCrossEntropy, rows);
  narrow_steps_of(power).gradients(p, group, rows);
  judge(p, group);
  copy_out(p, group, rows);
}
