// A row's way from its logits to its gradient, by itself. Included inside an anonymous namespace,
// after sweeps.inl.

// Of an exponential: without FMA the products of the polynomial are rounded, too.
#if defined(__FMA__) || defined(__aarch64__)
constexpr double kError = kEpsilon;
#else
constexpr double kError = 2 * kEpsilon;
#endif

// What of a row was good enough in float32.
enum Good { kNothing, kLoss, kAll };

// A row under way, from its sums to its gradient.
template <typename Real>
struct Job {
  int64_t row, label;
  double at_label;  // the student's logit, which float64 in place overwrites
  double teacher_at_label, more, label_off;  // decoupled.inl
  Power power, gradient_power;
  Place<Real> place;
  Scratch<Real> scratch;
  Sums<Real> sums;
  Between between;  // where the divergence asks for it
  Factors f;
  Sure sure;
  Entry entries[2];
  double squares;
  Good good;
};

inline Power power_of(const KdProblem& p, int64_t row) {
  if (!p.want_hard || !p.hard_active(row)) return kNoCrossEntropy;
  const double t = p.temperature;
  return t == 1 ? kFirst : t == 2 ? kSecond : t == 3 ? kThird : t == 4 ? kFourth : kOwnExponential;
}

template <typename Real>
Place<Real> place_of(const KdProblem& p, int64_t row, const Scratch<Real>& scratch) {
  Place<Real> place = {scratch.student, nullptr, false, false, false};
  if (!p.grad) return place;
  const int64_t width = element_size(p.student_dtype);
  place.grad = (char*)p.grad + p.grad_rows.start(row) * width;
  place.later = sizeof(Real) == 4 && p.grad == p.student;
  place.direct = !place.later && width == sizeof(Real);
  place.stream = !place.later && p.stream && can_stream(place.grad);
  // The exponentials are left where the gradient will be, if they may.
  if (place.direct && !place.stream) place.es = (Real*)place.grad;
  return place;
}

// A cross entropy that is only logged leaves no trace in the gradient, not even in its last bit.
inline Power gradient_power_of(const KdProblem& p, Power power) {
  return p.alpha == 1 ? kNoCrossEntropy : power;
}

// The student's logit of a class.
template <typename Real>
Real logit_of(const KdProblem& p, int64_t row, int64_t index) {
  const int64_t start = p.student_rows.start(row) * element_size(p.student_dtype);
  return load_one<Real>((const char*)p.student + start, p.student_dtype, index);
}

template <typename Real>
void prepare(const KdProblem& p, Job<Real>& job) {
  job.f = {};
  job.power = power_of(p, job.row);
  job.gradient_power = gradient_power_of(p, job.power);
  if (job.power == kNoCrossEntropy && !p.decoupled) return;
  job.label = p.label(job.row);
  job.at_label = logit_of<Real>(p, job.row, job.label);
  if (!p.decoupled) return;
  const int64_t start = p.teacher_rows.start(job.row) * element_size(p.teacher_dtype);
  job.teacher_at_label = load_one<Real>((const char*)p.teacher + start, p.teacher_dtype, job.label);
}

template <typename Real, int P>
void collect(const KdProblem& p, Job<Real>& job) {
  const auto sweep = p.general ? sweep1<Real, P, true, true>
                     : p.grad  ? sweep1<Real, P, true>
                               : sweep1<Real, P, false>;
  job.sums = sweep(p, job.row, job.place.es, job.scratch, p.decoupled ? job.label : -1);
}

// The sweep between the two; what is left for the last is v, as absolute numbers.
template <typename Real>
void compare(const KdProblem& p, Job<Real>& job) {
  Scratch<Real>& scratch = job.scratch;
  job.between = RowBetween<Real>{p, job.row, job.sums, job.place.es, scratch}.all();
  scratch.teacher = scratch.v;
  for (int64_t b = 0; b * kBlock < p.classes; ++b) scratch.teacher_max[b] = job.sums.teacher_max;
}

#include "decoupled.inl"

// The row's terms, and the factors of its gradient.
template <typename Real>
void conclude(const KdProblem& p, Job<Real>& job) {
  job.good = kAll;
  if (p.want_soft) {
    p.soft[job.row] = p.general ? job.between.loss : soft_loss(p, job.sums);
    const double off = p.general ? kError * job.between.loss_off : kError;
    if (!loss_is_exact(p, job.sums, p.soft[job.row], off)) job.good = kNothing;
    if (sizeof(Real) == 4 && p.general && job.between.vanished) job.good = kNothing;
  }
  if (p.alpha > 0) {
    soft_factors(p.scales, job.sums, job.f);
    if (p.general) {
      job.f.student *= -job.between.factor * job.between.mean;
      job.f.teacher = -job.between.factor * p.scales.soft_scale;
    }
  }
  if (job.power == kNoCrossEntropy) return;
  p.hard[job.row] = hard_loss(p, p.scales, job.sums, job.label, job.at_label, job.f);
}

// The entries of the gradient that cancel. They are blanked out of the sweep, which then adds only
// the smoothing's share.
template <typename Real, int P>
void single_out(const KdProblem& p, Job<Real>& job) {
  if (p.decoupled) return single_out_decoupled<Real, P>(p, job);
  const bool hard = P != kNoCrossEntropy;
  Real* const es = job.place.es;
  job.sure = sure_class<Real, P>(p, job.sums, es, job.scratch);
  job.entries[0] = label_entry<Real, P>(p, job.sums, job.f, es, job.scratch, job.label);
  job.entries[1] = {job.sure.index, 0};
  if (job.sure.index >= 0)
    job.entries[1].gradient = sure_gradient(p, job.f, job.sure, hard, job.label);
  if (job.sure.index == job.entries[0].index) job.entries[0].index = -1;
  job.squares = 0;
  for (const Entry& e : job.entries) {
    if (e.index < 0) continue;
    es[e.index] = job.scratch.teacher[e.index] = 0;
    if (P == kOwnExponential) job.scratch.hard[e.index] = 0;
    const double smooth = job.f.smooth * (p.weight ? p.weight[e.index] : 1.0);
    job.squares += e.gradient * e.gradient - smooth * smooth;
  }
}

// Whether float32 was enough for the gradient.
template <typename Real>
bool is_exact(const KdProblem& p, const Job<Real>& job, bool hard) {
  if (sizeof(Real) == 8) return true;
  if (!p.general) return gradient_is_exact(p, job.sums, job.f, hard, job.sure, job.squares, kError);
  const bool sured = job.sure.index >= 0;
  if (p.decoupled)
    return !gradient_at_risk(p, job.sums, job.f, hard, sured, job.sure, decoupled_error(job),
                             job.squares, kError);
  const Between& b = job.between;
  const double scale = p.scales.soft_scale * b.factor;
  const double q = sured ? squared(job.sure.student, job.sums.student) : squared(job.sums.student);
  // The sum of v is off by what each of them is, and is taken off every class by its q.
  const double of_mean = b.mean * b.mean + b.off + b.off_at_max;
  const double error =
      scale == 0 ? 0 : scale * scale * (b.off + (sured ? 0 : b.off_at_max) + of_mean * q);
  return !gradient_at_risk(p, job.sums, job.f, hard, sured, job.sure, error, job.squares, kError);
}

// Sweep 2 with those entries put in, unless float32 was not enough; in place nothing is lost then.
template <typename Real, int P>
void write(const KdProblem& p, Job<Real>& job) {
  const Place<Real>& place = job.place;
  job.squares += sweep2<Real, P>(p, job.sums, job.f, place, job.scratch);
  if (!is_exact(p, job, P != kNoCrossEntropy)) {
    job.good = kLoss;
    return;
  }
  if (place.later) store_block(place.es, p.classes, p.student_dtype, place.grad, 0, false);
  for (const Entry& e : job.entries) {
    const Real value = (Real)e.gradient;
    if (e.index >= 0) store_block(&value, 1, p.student_dtype, place.grad, e.index, false);
  }
}

template <typename Real>
struct Steps {
  void (*collect)(const KdProblem&, Job<Real>&);
  void (*single_out)(const KdProblem&, Job<Real>&);
  void (*write)(const KdProblem&, Job<Real>&);
};
template <typename Real, int P>
constexpr Steps<Real> kSteps = {collect<Real, P>, single_out<Real, P>, write<Real, P>};

template <typename Real>
const Steps<Real>& steps_of(Power power) {
  switch (power) {
    case kNoCrossEntropy:
      return kSteps<Real, kNoCrossEntropy>;
    case kFirst:
      return kSteps<Real, kFirst>;
    case kSecond:
      return kSteps<Real, kSecond>;
    case kThird:
      return kSteps<Real, kThird>;
    case kFourth:
      return kSteps<Real, kFourth>;
    default:
      return kSteps<Real, kOwnExponential>;
  }
}

template <typename Real>
Scratch<Real> scratch_of(const KdProblem& p, char* memory) {
  const int64_t row_size = kd_scratch_row(p), blocks = p.classes / kBlock + 1;
  Real* const base = (Real*)memory;
  Real* const v = base + 3 * row_size;
  Real* const maxima = p.general ? v + row_size + 2 * kBlock : v;
  return {base, base + row_size, base + 2 * row_size,  maxima, maxima + blocks,
          v,    v + row_size,    v + row_size + kBlock};
}

template <typename Real>
Good visit(const KdProblem& p, int64_t row, char* memory) {
  Job<Real> job;
  job.row = row;
  job.scratch = scratch_of<Real>(p, memory);
  prepare(p, job);
  job.place = place_of(p, row, job.scratch);
  steps_of<Real>(job.power).collect(p, job);
  if (p.general && !p.decoupled) compare(p, job);
  p.decoupled ? conclude_decoupled(p, job) : conclude(p, job);
  if (!p.grad || job.good != kAll) return job.good;
  const Steps<Real>& steps = steps_of<Real>(job.gradient_power);
  steps.single_out(p, job);
  steps.write(p, job);
  return job.good;
}

void visit_again(const KdProblem& p, int64_t row, Good good, char* memory) {
  const double soft = p.soft[row], hard = p.hard[row];
  visit<double>(p, row, memory);
  // A gradient done again leaves the loss alone: asking for one does not change the other.
  if (good == kLoss) p.soft[row] = soft, p.hard[row] = hard;
}
