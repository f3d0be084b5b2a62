// Rows of few classes: a row in each lane, class after class. A row by itself would be a vector or
// two of exponentials among a thousand instructions that reduce vectors, and wait. Included inside
// an anonymous namespace, after jobs.inl.

constexpr int kRows = Lanes<float>::kCount;
// From about there on a row fills its own vectors: see benchmarks/NOTES.md.
constexpr int64_t kNarrow = 32;

// Smoothing adds up logits and class weights, which is left to the sweeps.
inline bool is_narrow(const KdProblem& p) {
  return p.classes <= kNarrow && p.label_smoothing == 0 && !p.in_double;
}

// The rows at hand, and what their lanes have come to.
struct Narrow {
  Job<float>* jobs[kRows];
  int count;
  // [classes][kRows]: logits, then exponentials, and the gradient in place of the student's.
  float *student, *teacher, *hard;
  // Sums over the classes but those of the student's maximum, and over the teacher's at those.
  alignas(64) double others_student[kRows], others_teacher[kRows], others_hard[kRows];
  alignas(64) double at_max[kRows], cross[kRows];
  alignas(64) float student_max[kRows], teacher_max[kRows];
  alignas(64) float ones[kRows];   // how many classes have the student's maximum
  alignas(64) float index[kRows];  // of the last one
  alignas(64) float odd[kRows];    // NaN where a logit is no number: left to the sweeps
  alignas(64) float of_q[kRows], of_p[kRows], of_r[kRows], squares[kRows];
  alignas(64) float singled[2][kRows], entries[2][kRows];  // classes, or -1, and their gradients
};

KD_INLINE void put(const WideSum<float>& sum, double* lanes) {
  store(lanes, sum.low);
  store(lanes + Lanes<double>::kCount, sum.high);
}

template <typename E>
void copy_in(const void* row, int64_t classes, float* lane) {
  const E* const from = (const E*)row;
  for (int64_t k = 0; k < classes; ++k) lane[k * kRows] = (float)value_of(from[k]);
}
template <typename E>
void copy_out(const float* lane, int64_t classes, void* row) {
  E* const to = (E*)row;
  for (int64_t k = 0; k < classes; ++k) to[k] = ElementOf<E>::of(lane[k * kRows]);
}

inline void copy_row_in(const void* row, KdDtype dtype, int64_t classes, float* lane) {
  switch (dtype) {
    case kBFloat16:
      return copy_in<BFloat16>(row, classes, lane);
    case kFloat16:
      return copy_in<Float16>(row, classes, lane);
    default:
      return copy_in<float>(row, classes, lane);
  }
}

void copy_in(const KdProblem& p, Narrow& rows) {
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = rows.jobs[r < rows.count ? r : 0]->row;  // no lane is empty
    copy_row_in((const char*)p.student + p.student_rows.start(row) * element_size(p.student_dtype),
                p.student_dtype, p.classes, rows.student + r);
    copy_row_in((const char*)p.teacher + p.teacher_rows.start(row) * element_size(p.teacher_dtype),
                p.teacher_dtype, p.classes, rows.teacher + r);
  }
}

template <int P>
void collect(const KdProblem& p, Narrow& rows) {
  typedef Vec<float> V;
  V student_max = splat<float>(-INFINITY), teacher_max = student_max;
  for (int64_t k = 0; k < p.classes; ++k) {
    const V x = load(rows.student + k * kRows), y = load(rows.teacher + k * kRows);
    student_max = at_least(student_max, x);
    teacher_max = at_least(teacher_max, y);
  }
  const Exponent<float> soft_exponent(kLog2E / p.temperature), hard_exponent(kLog2E);
  WideSum<float> others_student, others_teacher, others_hard, at_max, cross;
  V ones = {}, index = {}, odd = {};
  for (int64_t k = 0; k < p.classes; ++k) {
    const V ds = load(rows.student + k * kRows) - student_max;
    const V dt = load(rows.teacher + k * kRows) - teacher_max;
    const V es = exp2_scaled(ds, soft_exponent), et = exp2_scaled(dt, soft_exponent);
    odd += (ds - ds) + (dt - dt);  // NaN, too, where their distance is no number
    const auto is_max = ds == V{};
    ones += is_max ? splat<float>(1) : V{};
    index = is_max ? splat<float>((float)k) : index;
    others_student.add(is_max ? V{} : es);
    others_teacher.add(is_max ? V{} : et);
    at_max.add(is_max ? et : V{});
    cross.add(et * (dt - ds));
    store(rows.student + k * kRows, es);
    store(rows.teacher + k * kRows, et);
    if (P == kNoCrossEntropy) continue;
    const V e1 = P == kOwnExponential ? exp2_scaled(ds, hard_exponent) : power<P>(es);
    others_hard.add(is_max ? V{} : e1);
    if (P == kOwnExponential) store(rows.hard + k * kRows, e1);
  }
  put(others_student, rows.others_student);
  put(others_teacher, rows.others_teacher);
  put(others_hard, rows.others_hard);
  put(at_max, rows.at_max);
  put(cross, rows.cross);
  store(rows.student_max, student_max);
  store(rows.teacher_max, teacher_max);
  store(rows.ones, ones);
  store(rows.index, index);
  store(rows.odd, odd);
}

// Lane r's sums as those of a row by itself.
inline Sums<float> sums_of(const Narrow& rows, int r) {
  const double ones = rows.ones[r];
  return {rows.student_max[r],
          rows.teacher_max[r],
          rows.others_student[r] + ones,
          rows.others_teacher[r] + rows.at_max[r],
          rows.cross[r],
          rows.others_hard[r] + ones,
          0,
          false};
}

template <int P>
void single_out(const KdProblem& p, Narrow& rows, int r) {
  const bool hard = P != kNoCrossEntropy;
  Job<float>& job = *rows.jobs[r];
  job.sure = {-1, 0, 0, 0};
  if (is_sure(job.sums, hard))
    job.sure = {(int64_t)rows.index[r], rows.others_student[r], rows.others_teacher[r],
                rows.others_hard[r]};
  job.entries[0] = job.entries[1] = {-1, 0};
  if (hard) {
    const int64_t at = job.label * kRows + r;
    const double x = rows.student[at];
    const double z = P == kOwnExponential ? rows.hard[at] : power<P>(x);
    job.entries[0] = {job.label, label_gradient(p, job.f, job.label, x, rows.teacher[at], z)};
  }
  if (job.sure.index >= 0)
    job.entries[1] = {job.sure.index, sure_gradient(p, job.f, job.sure, hard, job.label)};
  if (job.sure.index == job.entries[0].index) job.entries[0].index = -1;
  for (int e = 0; e < 2; ++e) {
    rows.singled[e][r] = (float)job.entries[e].index;
    rows.entries[e][r] = (float)job.entries[e].gradient;
  }
  rows.of_q[r] = (float)job.f.student;
  rows.of_p[r] = (float)job.f.teacher;
  rows.of_r[r] = (float)job.f.hard;
}

template <int P>
void gradients(const KdProblem& p, Narrow& rows) {
  typedef Vec<float> V;
  const V a = load(rows.of_q), b = load(rows.of_p), c = load(rows.of_r);
  const V first = load(rows.singled[0]), second = load(rows.singled[1]);
  V squares = {};
  for (int64_t k = 0; k < p.classes; ++k) {
    const V x = load(rows.student + k * kRows), y = load(rows.teacher + k * kRows);
    V g = rounded(a * x) - rounded(b * y);
    if (P != kNoCrossEntropy)
      g += c * (P == kOwnExponential ? load(rows.hard + k * kRows) : power<P>(x));
    g = first == splat<float>((float)k) ? load(rows.entries[0]) : g;
    g = second == splat<float>((float)k) ? load(rows.entries[1]) : g;
    squares += g * g;
    store(rows.student + k * kRows, g);
  }
  store(rows.squares, squares);
}

inline void copy_row_out(const KdProblem& p, const float* lane, void* row) {
  switch (p.student_dtype) {
    case kBFloat16:
      return copy_out<BFloat16>(lane, p.classes, row);
    case kFloat16:
      return copy_out<Float16>(lane, p.classes, row);
    default:
      return copy_out<float>(lane, p.classes, row);
  }
}

struct NarrowSteps {
  void (*collect)(const KdProblem&, Narrow&);
  void (*single_out)(const KdProblem&, Narrow&, int);
  void (*gradients)(const KdProblem&, Narrow&);
};
template <int P>
constexpr NarrowSteps kNarrowSteps = {collect<P>, single_out<P>, gradients<P>};

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

// Rows of one power, up to the gradient. What is not good enough stays marked so; what is odd has
// not even been looked at.
void visit_narrow(const KdProblem& p, Narrow& rows) {
  copy_in(p, rows);
  narrow_steps_of(rows.jobs[0]->power).collect(p, rows);
  const NarrowSteps& steps = narrow_steps_of(rows.jobs[0]->gradient_power);
  for (int r = 0; r < kRows; ++r) {
    rows.of_q[r] = rows.of_p[r] = rows.of_r[r] = 0;
    rows.singled[0][r] = rows.singled[1][r] = -1;
    if (r >= rows.count) continue;
    Job<float>& job = *rows.jobs[r];
    job.odd = !(rows.odd[r] == 0);
    if (job.odd) continue;
    job.sums = sums_of(rows, r);
    conclude(p, job);
    if (p.grad && job.good == kAll) steps.single_out(p, rows, r);
  }
  if (!p.grad) return;
  steps.gradients(p, rows);
  const int64_t width = element_size(p.student_dtype);
  for (int r = 0; r < rows.count; ++r) {
    Job<float>& job = *rows.jobs[r];
    if (job.odd || job.good != kAll) continue;
    const bool hard = job.gradient_power != kNoCrossEntropy;
    if (gradient_is_exact(p, job.sums, job.f, hard, job.sure, rows.squares[r], kError))
      copy_row_out(p, rows.student + r, (char*)p.grad + p.grad_rows.start(job.row) * width);
    else
      job.good = kLoss;
  }
}

void visit_narrow(const KdProblem& p, Job<float>* jobs, int count, char* memory) {
  Narrow rows;
  rows.student = (float*)memory;
  rows.teacher = rows.student + kNarrow * kRows;
  rows.hard = rows.teacher + kNarrow * kRows;
  for (int k = 0; k < count; ++k) prepare(p, jobs[k]);
  for (int hard = 0; hard < 2; ++hard) {
    rows.count = 0;
    for (int k = 0; k < count; ++k) {
      if (int{jobs[k].power != kNoCrossEntropy} == hard) rows.jobs[rows.count++] = jobs + k;
      if (rows.count < kRows && (k + 1 < count || rows.count == 0)) continue;
      visit_narrow(p, rows);
      rows.count = 0;
    }
  }
}
