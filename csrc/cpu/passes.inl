// Rows that take more than one look: several temperatures or teachers, terms at temperatures of
// their own, logits that are mapped or standardised. Each pass is a problem of one row for the
// sweeps that serve all others; their gradients are added up, and led back through what was done to
// the logits. Included inside an anonymous namespace, after jobs.inl.

template <typename Real>
constexpr KdDtype kTypeOf = sizeof(Real) == 8 ? kFloat64 : kFloat32;

// The mean of the logits that are not masked, and what they are divided by.
struct Spread {
  double mean, deviation, degrees;  // deviation 1: they are all the same
  bool constant;
};

template <typename Real>
Spread spread_of(const Real* row, int64_t n) {
  double sum = 0, squares = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (row[i] != -INFINITY) sum += row[i], ++count;
  const double mean = count ? sum / count : 0;
  for (int64_t i = 0; i < n; ++i)
    if (row[i] != -INFINITY) squares += (row[i] - mean) * (row[i] - mean);
  const double degrees = count > 1 ? count - 1 : 1;
  const bool constant = squares == 0;
  return {mean, constant ? 1 : sqrt(squares / degrees) + 1e-7, degrees, constant};
}

template <typename Real>
struct Passes {
  const KdProblem& p;
  int64_t row;
  char* memory;  // for the sweeps
  Rows<Real> rows;
  Real *student_row, *teacher_row, *grad, *total;  // [classes] each
  KnownClass* known;

  Effective<Real> student;
  Spread of_student;
  double weight;  // of the sample
  bool label;     // the row has one that counts
  double soft = 0, hard = 0, added = 0;
  double squares = 0;                           // of the passes' gradients, one by one
  double ce_of_student = 0, ce_of_teacher = 0;  // of the label, at temperature 1
  Good good = kAll;

  Passes(const KdProblem& p, int64_t row, char* memory)
      : p(p), row(row), memory(memory), rows{p, row, nullptr, nullptr} {
    const int64_t size = (p.classes + 31) / 16 * 16;
    double* own = (double*)memory + (kd_scratch_size(p) + 7) / 8 * 8;
    rows.wide = own, rows.other = own + size;
    student_row = (Real*)(own + 2 * size), teacher_row = (Real*)(own + 3 * size);
    grad = (Real*)(own + 4 * size), total = (Real*)(own + 5 * size);
    known = (KnownClass*)(own + 6 * size);
    weight = p.row_weight(row);
    label = p.hard_active(row);
  }

  // The problem of this row alone, without a teacher and with neither term.
  KdProblem alone() const {
    KdProblem q = p;
    q.plan = nullptr;
    q.student = q.teacher = student.values;
    q.student_dtype = q.teacher_dtype = kTypeOf<Real>;
    q.student_rows = q.teacher_rows = q.grad_rows = {1, p.classes, 0};
    q.grad = p.grad ? grad : nullptr;
    q.rows = 1;
    q.in_double = sizeof(Real) == 8;
    q.stream = q.want_soft = q.want_hard = q.general = q.decoupled = false;
    const int64_t width = p.labels_are_int64 ? 8 : 4;
    q.labels = label ? (const char*)p.labels + row * width : nullptr;
    q.logit_shift = student.shift;
    return q;
  }

  // Runs the problem, and adds its gradient to the others'.
  Good run(KdProblem& q, double& soft_term, double& hard_term) {
    q.soft = &soft_term, q.hard = &hard_term;
    soft_term = hard_term = 0;
    const Good of_pass = visit<Real>(q, 0, memory);
    if (of_pass < good) good = of_pass;
    return of_pass;
  }

  void add_gradient(const Spread* spread) {
    if (!p.grad) return;
    if (spread && !spread->constant) project(*spread);
    double of_pass = 0;
    for (int64_t i = 0; i < p.classes; ++i) {
      of_pass += (double)grad[i] * grad[i];
      total[i] += grad[i];
    }
    squares += of_pass;
  }

  // A standardised row has a temperature of its own, which its logits change, too.
  void project(const Spread& s) {
    double dot = 0, before = 0, after = 0;
    for (int64_t i = 0; i < p.classes; ++i) {
      before += (double)grad[i] * grad[i];
      if (student.values[i] != -INFINITY) dot += grad[i] * (student.values[i] - s.mean);
    }
    const double factor = dot / (s.deviation * (s.deviation - 1e-7) * s.degrees);
    for (int64_t i = 0; i < p.classes; ++i) {
      if (student.values[i] == -INFINITY) continue;
      grad[i] -= (Real)(factor * (student.values[i] - s.mean));
      after += (double)grad[i] * grad[i];
    }
    if (sizeof(Real) == 4 && 4 * after < before && good == kAll) good = kLoss;
  }

  // The cross entropy, `scale` times its weight in the batch; its value. `plain`: without class
  // weights, smoothing and z-loss.
  double cross_entropy(double scale, bool plain) {
    KdProblem q = alone();
    q.alpha = 0, q.want_hard = true, q.temperature = q.teacher_temperature = 1;
    q.scales.hard_scale = scale;
    if (plain) {
      q.weight = nullptr;
      q.label_smoothing = q.z_loss = 0;
      q.scales.weight_sum = (double)p.classes;
    }
    double none, value;
    run(q, none, value);
    add_gradient(nullptr);
    return value;
  }

  // A pass's temperatures in this row.
  double temperature_of(const KdPass& pass) const {
    const double* own = p.plan->row_temperature;
    return own && !pass.added ? own[row] : pass.temperature;
  }
  double teacher_temperature_of(const KdPass& pass) const {
    const bool same = pass.temperature == pass.teacher_temperature;
    return same ? temperature_of(pass) : pass.teacher_temperature;
  }

  void visit_pass(const KdPass& pass, int view) {
    KdProblem q = alone();
    const double nominal = temperature_of(pass);
    const bool standardize = p.plan->standardize && !pass.added;
    q.temperature = nominal * (standardize ? of_student.deviation : 1);
    const double t2 = p.plan->scale_by_t2 && !pass.added ? nominal * nominal : 1;
    q.soft_factor = t2 * pass.weight * rows.weight_of(view) * weight;
    const double base = pass.added ? p.plan->added_scale : p.plan->soft_scale;
    q.alpha = base != 0, q.want_soft = true;
    q.scales.soft_scale = base * q.soft_factor / q.temperature;
    q.scales.hard_scale = 0;
    take_terms(q, pass);
    const KdDivergence kind = q.term[0].kind;
    const bool copied = kind == kNormalized || kind == kWeightedSoft || kind == kTeacherLabel;
    if (kind == kNormalized || kind == kWeightedSoft) look_at_label(q, view);
    take_teacher(q, view, standardize, teacher_temperature_of(pass), copied);
    q.general = q.general || q.temperature != q.teacher_temperature;
    const double value = compared(q, base, t2);
    (pass.added ? added : soft) += value;
    if (q.alpha > 0) add_gradient(standardize ? &of_student : nullptr);
  }

  // `copied`: as a row of Real, whatever it is.
  void take_teacher(KdProblem& q, int view, bool standardize, double temperature, bool copied) {
    q.teacher_temperature = temperature;
    if (p.plan->top_k.k > 0) return;
    q.teacher = rows.teacher_row(view), q.teacher_dtype = p.plan->teacher[view].dtype;
    if (rows.as_it_is(view) && !standardize && !copied) return;
    const Effective<Real> teacher = rows.teacher(view, temperature, teacher_row);
    q.teacher = teacher.values, q.teacher_dtype = kTypeOf<Real>;
    if (!standardize) return;
    // Divided by the student's deviation instead of its own, as the one temperature will do.
    const double ratio = of_student.deviation / spread_of(teacher.values, p.classes).deviation;
    for (int64_t i = 0; i < p.classes; ++i) teacher.values[i] = (Real)(teacher.values[i] * ratio);
    q.teacher_temperature *= of_student.deviation;
  }

  // The pass's terms with what is given of them per row.
  void take_terms(KdProblem& q, const KdPass& pass) {
    q.terms = pass.terms;
    for (int k = 0; k < pass.terms; ++k) {
      const Term t = term_of(pass.term[k], row);
      q.term[k] = {t.kind, t.weight, t.parameter, pass.term[k].second, nullptr, nullptr};
      if (t.kind == kCorrelation) q.term[k].parameter = 1;  // is in the weight
    }
    q.general = !(q.terms == 1 && q.term[0].weight == 1 && q.term[0].kind == kForwardKL);
    q.decoupled = q.term[0].kind == kDecoupled;
  }

  double compared(KdProblem& q, double base, double t2) {
    if (q.term[0].kind == kNormalized) return normalized(q, base, t2);
    if (q.term[0].kind == kWeightedSoft) return weighted_soft(q);
    if (q.term[0].kind == kTeacherLabel) return teacher_label(q);
    if (p.plan->top_k.k > 0) return top_k(q);
    if (!q.decoupled) q.labels = nullptr;
    double value, none;
    run(q, value, none);
    return value;
  }

  // The k classes of the teacher that are known.
  double top_k(KdProblem& q) {
    const KdTopK& t = p.plan->top_k;
    double largest = -INFINITY, total = 0;
    const double* values = t.values + row * t.k;
    for (int64_t k = 0; k < t.k; ++k) {
      known[k] = {t.indices[row * t.k + k], 0, values[k], 0, 0};
      if (t.tail == kRenormalize) known[k].log_p /= q.teacher_temperature;
      if (!(known[k].log_p <= largest)) largest = known[k].log_p;
    }
    if (t.tail == kRenormalize) {
      for (int64_t k = 0; k < t.k; ++k) total += exp(known[k].log_p - largest);
      for (int64_t k = 0; k < t.k; ++k) known[k].log_p -= largest + log(total);
    }
    return of_known(q, t.k, t.tail);
  }

  // As if the largest class were all that the teacher says.
  double teacher_label(KdProblem& q) {
    const Real* values = (const Real*)q.teacher;
    const Description<Real> d = describe(values, p.classes, 1, -1);
    known[0] = {d.largest, 0, d.max == d.max ? 0 : (double)NAN, 0, 0};
    q.term[0].kind = kForwardKL;
    return of_known(q, 1, kRenormalize);
  }

  double of_known(KdProblem& q, int64_t count, KdTail tail) {
    for (int64_t k = 0; k < count; ++k) known[k].logit = student.values[known[k].index];
    memcpy(grad, student.values, p.classes * sizeof(Real));
    KnownRow<Real> of = {q, known, count, tail, grad, 0, 0, 0, 0, 0, 0};
    of.sweep();
    of.compare();
    const double value = q.soft_factor * of.value;
    if (sizeof(Real) == 4 && loss_at_risk(q, value, kError)) good = kNothing;
    if (p.grad) of.write(q.scales.soft_scale);
    return value;
  }

  // The label's cross entropies at temperature 1.
  void look_at_label(const KdProblem& q, int view) {
    const Effective<Real> teacher = rows.teacher(view, 1, teacher_row);
    ce_of_teacher = cross_entropy_at(teacher.values, p.classes, q.label(0));
    ce_of_student = cross_entropy_at(student.values, p.classes, q.label(0));
  }

  // NKD: the label's cross entropy by the teacher's share of it, at temperature 1; and that of the
  // others among themselves, of which decoupled distillation knows the gradient.
  double normalized(KdProblem& q, double base, double t2) {
    const double gamma = q.term[0].parameter, share = q.term[0].weight;
    const double at_label = q.soft_factor / t2 * share * exp(-ce_of_teacher);
    const double of_label = at_label * cross_entropy(base * at_label, true);
    if (gamma == 0) {
      if (p.grad) memset(grad, 0, p.classes * sizeof(Real));
      return of_label;
    }
    const Description<Real> others =
        describe((const Real*)q.teacher, p.classes, q.teacher_temperature, q.label(0));
    q.decoupled = true;
    q.term[0] = {kDecoupled, share, 0, gamma, nullptr, nullptr};
    double value, none;
    run(q, value, none);
    const bool any = others.sum > 0 || others.max != others.max;
    return of_label + value + (any ? q.soft_factor * share * gamma * others.entropy() : 0);
  }

  // WSLD: the soft labels' cross entropy, the less the better the student does beside the teacher.
  double weighted_soft(KdProblem& q) {
    const double alpha = q.term[0].parameter, share = q.term[0].weight;
    const double w = -expm1(-ce_of_student / (ce_of_teacher + 1e-7)) * alpha * share;
    q.labels = nullptr;
    q.term[0] = {kForwardKL, w, 0, 0, nullptr, nullptr};
    double value, none;
    run(q, value, none);
    const Description<Real> of_p =
        describe((const Real*)q.teacher, p.classes, q.teacher_temperature, -1);
    return value + (w == 0 ? 0 : q.soft_factor * w * of_p.entropy());
  }

  void measure() {
    double* const out = p.plan->metrics + 4 * row;
    const Description<Real> of_student = describe(student.values, p.classes, 1, -1);
    out[0] = of_student.entropy();
    if (p.plan->top_k.k > 0) {
      measure_top_k(out, of_student.largest);
    } else {
      const Effective<Real> teacher = mean_teacher();
      const Description<Real> d = describe(teacher.values, p.classes, 1, -1);
      out[1] = d.entropy(), out[2] = d.largest == of_student.largest;
    }
    out[3] = label && p.label(row) == of_student.largest;
  }

  Effective<Real> mean_teacher() {
    Rows<Real> all = rows;
    KdProblem q = p;
    KdPlan plan = *p.plan;
    if (plan.ensemble == kOfLosses) plan.ensemble = kOfProbabilities;
    q.plan = &plan;
    return Rows<Real>{q, row, all.wide, all.other}.teacher(0, 1, teacher_row);
  }

  void measure_top_k(double* out, int64_t guess) const {
    const KdTopK& t = p.plan->top_k;
    const double* values = t.values + row * t.k;
    int64_t best = 0;
    for (int64_t k = 1; k < t.k; ++k)
      if (values[k] > values[best]) best = k;
    double sum = 0, moment = 0;
    for (int64_t k = 0; k < t.k; ++k) {
      const double distance = values[k] - values[best], e = exp(distance);
      sum += e, moment += e == 0 ? 0 : e * distance;
    }
    out[1] = log(sum) - moment / sum, out[2] = t.indices[row * t.k + best] == guess;
  }

  // All passes. `finish` has still to write the gradient.
  Good visit_all() {
    const KdPlan& plan = *p.plan;
    student = rows.student(student_row);
    if (p.grad) memset(total, 0, p.classes * sizeof(Real));
    if (plan.standardize) of_student = spread_of(student.values, p.classes);
    for (int k = 0; k < plan.passes; ++k)
      if (plan.pass[k].added || p.want_soft)
        for (int view = 0; view < rows.views(); ++view) visit_pass(plan.pass[k], view);
    if (p.want_hard && label) hard = weight * cross_entropy(weight * p.scales.hard_scale, false);
    if (plan.metrics) measure();
    if (sizeof(Real) == 8 || good != kAll || !p.grad) return good;
    double of_total = 0;
    for (int64_t i = 0; i < p.classes; ++i) of_total += (double)total[i] * total[i];
    return 4 * of_total < squares ? kLoss : kAll;
  }

  // The gradient of the logits as they came, in blocks: in place they are read for the last time.
  void finish() {
    const Mapping mapping = rows.of_student();
    char* const out = (char*)p.grad + p.grad_rows.start(row) * element_size(p.student_dtype);
    if (!mapping.is_identity())
      for (int64_t i = 0; i < p.classes; ++i) {
        const double x = load_one<double>(rows.student_row(), p.student_dtype, i);
        total[i] = (Real)(total[i] * mapping.slope(x, i));
      }
    store_block(total, p.classes, p.student_dtype, out, 0, false);
  }

  void put_terms() const { p.soft[row] = soft, p.hard[row] = hard, p.plan->added[row] = added; }
};

void visit_plan(const KdProblem& p, int64_t row, char* memory) {
  Good good = kNothing;
  if (!p.in_double) {
    Passes<float> passes(p, row, memory);
    good = passes.visit_all();
    if (good != kNothing) passes.put_terms();
    if (good == kAll && p.grad) passes.finish();
  }
  if (good == kAll) return;
  Passes<double> passes(p, row, memory);
  passes.visit_all();
  // A gradient done again leaves the loss alone: asking for one does not change the other.
  if (good == kNothing) passes.put_terms();
  if (p.grad) passes.finish();
}
