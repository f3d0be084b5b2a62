// Rows that take more than one look: several temperatures or teachers, terms at temperatures of
// their own, logits that are mapped or standardised. Each pass is a problem of one row for the
// sweeps that serve all others; their gradients are added up, and led back through what was done to
// the logits. Included inside an anonymous namespace, after jobs.inl.

template <typename Real>
struct Passes {
  const KdProblem& p;
  int64_t row;
  char* memory;  // for the sweeps
  Rows<Real> rows;
  Real *student_row, *teacher_row, *grad, *total;  // [classes] each
  bool begun = false;                              // total holds something
  KnownClass* known;

  Effective<Real> student;
  Spread of_student;
  double weight;  // of the sample
  bool label;     // the row has one that counts
  double soft = 0, hard = 0, added = 0;
  double squares = 0;  // of the passes' gradients, one by one
  bool hard_is_had = false;
  double ce_of_student = 0, ce_of_teacher = 0;  // of the label, at temperature 1
  Good good = kAll;

  Passes(const KdProblem& p, int64_t row, char* memory)
      : p(p), row(row), memory(memory), rows{p, row, nullptr, nullptr} {
    const int64_t size = (p.classes + 31) / 16 * 16;
    double* own = (double*)memory + (kd_scratch_size(p) + 7) / 8 * 8;
    rows.wide = own, rows.other = own + size;
    student_row = (Real*)(own + 2 * size), teacher_row = (Real*)(own + 3 * size);
    grad = (Real*)(own + 4 * size), total = (Real*)(own + 5 * size);
    // In place the logits are needed to the end.
    if (p.grad && p.grad != p.student && p.student_dtype == kTypeOf<Real>)
      total = (Real*)((char*)p.grad + p.grad_rows.start(row) * sizeof(Real));
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
    q.grad = p.grad ? target() : nullptr;
    q.rows = 1;
    q.in_double = sizeof(Real) == 8;
    q.stream = q.want_soft = q.want_hard = q.general = q.decoupled = false;
    const int64_t width = p.labels_are_int64 ? 8 : 4;
    q.labels = label ? (const char*)p.labels + row * width : nullptr;
    q.logit_shift = student.shift;
    return q;
  }

  void run(KdProblem& q, double& soft_term, double& hard_term) {
    q.soft = &soft_term, q.hard = &hard_term;
    soft_term = hard_term = 0;
    const Good of_pass = visit<Real>(q, 0, memory);
    if (of_pass < good) good = of_pass;
  }

  // Where the next gradient goes: the first is the beginning of the sum.
  Real* target() const { return begun ? grad : total; }

  void add_gradient(const Spread* spread) {
    if (!p.grad) return;
    if (spread && spread->deviation != 0) project(*spread);
    if (begun) {
      if (squares == 0) squares = sum_of_squares(total, p.classes);
      squares += sum_of_squares(grad, p.classes);
      add_to(total, grad, p.classes);
    }
    begun = true;
  }

  // A standardised row has a temperature of its own, which its logits change, too.
  void project(const Spread& s) {
    typedef Vec<Real> V;
    Real* const g = target();
    const Real masked = -INFINITY, mean = (Real)s.mean, origin = (Real)s.origin, zero = 0;
    WideSum<Real> dots;
    const double before = sum_of_squares(g, p.classes);
    each<Real>(p.classes, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const V x = part.get(student.values + i, masked), none = {};
      dots.add(x == masked ? none : part.get(g + i, zero) * (x - origin - mean));
    });
    const double factor = dots.total() / (s.divisor() * s.deviation * s.degrees);
    each<Real>(p.classes, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const V x = part.get(student.values + i, masked), none = {};
      part.put(g + i,
               part.get(g + i, zero) - (x == masked ? none : (x - origin - mean) * (Real)factor));
    });
    const bool cancels = 4 * sum_of_squares(g, p.classes) < before;
    if (sizeof(Real) == 4 && cancels && good == kAll) good = kLoss;
  }

  // The cross entropy in a pass of its own; its value. `plain`: without class weights, smoothing
  // and z-loss.
  double cross_entropy(double scale, bool plain) {
    KdProblem q = alone();
    q.temperature = q.teacher_temperature = 1;
    double value, none;
    if (plain) {  // the label is all that such a teacher knows
      q.scales.soft_scale = scale;
      q.soft_factor = q.alpha = 1;
      q.terms = 1, q.term[0] = {kForwardKL, 1, 0, 0, nullptr, nullptr};
      known[0] = {q.label(0), 0, 0, 0, 0};
      value = of_known(q, 1, kRenormalize);
    } else {
      q.scales.hard_scale = scale;
      q.alpha = 0, q.want_hard = true;
      run(q, none, value);
    }
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
    q.temperature = nominal * (standardize ? of_student.divisor() : 1);
    const double t2 = p.plan->scale_by_t2 && !pass.added ? nominal * nominal : 1;
    q.soft_factor = t2 * pass.weight * rows.weight_of(view) * weight;
    const double base = pass.added ? p.added_scale : p.plan_scale;
    q.alpha = base != 0, q.want_soft = true;
    q.scales.soft_scale = base * q.soft_factor / q.temperature;
    q.scales.hard_scale = 0;
    if (takes_hard(pass)) q.alpha = p.alpha, q.want_hard = true, hard_is_had = true;
    if (q.want_hard) q.scales.hard_scale = weight * p.scales.hard_scale;
    take_terms(q, pass);
    const KdDivergence kind = q.term[0].kind;
    const bool copied = kind == kNormalized || kind == kWeightedSoft || kind == kTeacherLabel;
    if (kind == kNormalized || kind == kWeightedSoft) look_at_label(q, view);
    take_teacher(q, view, standardize, teacher_temperature_of(pass), copied);
    q.general = q.general || q.temperature != q.teacher_temperature;
    const double value = compared(q, base, t2);
    (pass.added ? added : soft) += value;
    if (base != 0 || q.want_hard) add_gradient(standardize ? &of_student : nullptr);
  }

  bool is_plain() const { return !p.weight && p.label_smoothing == 0 && p.z_loss == 0; }

  // Whether the pass has the cross entropy in its sweeps.
  bool takes_hard(const KdPass& pass) const {
    const KdDivergence kind = p.plan->term[pass.first].kind;
    // The label's own cross entropy is NKD's, if nothing is special about it.
    if (kind == kTeacherLabel || (kind == kNormalized && !is_plain())) return false;
    return p.want_hard && label && !hard_is_had && !pass.added && !p.plan->standardize &&
           p.plan->top_k.k == 0;
  }

  // `copied`: as a row of Real, whatever it is.
  void take_teacher(KdProblem& q, int view, bool standardize, double temperature, bool copied) {
    q.teacher_temperature = temperature;
    if (p.plan->top_k.k > 0) return;
    q.teacher = rows.teacher_row(view), q.teacher_dtype = p.plan->teacher[view].dtype;
    if (rows.as_they_are() && !standardize && !copied) return;
    // Divided by the student's deviation instead of their own, as the one temperature will do.
    const double divisor = standardize ? of_student.divisor() : 0;
    q.teacher = rows.teacher(view, temperature, divisor, teacher_row).values;
    q.teacher_dtype = kTypeOf<Real>;
    if (standardize) q.teacher_temperature *= divisor;
  }

  // The pass's terms with what is given of them per row.
  void take_terms(KdProblem& q, const KdPass& pass) {
    q.terms = pass.terms;
    for (int k = 0; k < pass.terms; ++k) {
      const KdTerm& term = p.plan->term[pass.first + k];
      const Term t = term_of(term, row);
      q.term[k] = {t.kind, t.weight, t.parameter, term.second, nullptr, nullptr};
      if (t.kind == kCorrelation) q.term[k].parameter = 1;  // is in the weight
    }
    q.general = !(q.terms == 1 && q.term[0].weight == 1 && q.term[0].kind == kForwardKL);
    q.decoupled = q.term[0].kind == kDecoupled;
  }

  double compared(KdProblem& q, double base, double t2) {
    if (q.term[0].kind == kNormalized) return normalized(q, base, t2);
    if (q.term[0].kind == kWeightedSoft) return weighted_soft(q);
    if (p.plan->top_k.k > 0) return top_k(q);
    if (q.term[0].kind == kTeacherLabel) return teacher_label(q);
    double value, of_label;
    run(q, value, of_label);
    if (q.want_hard) hard = weight * of_label;
    return value;
  }

  // The k classes of the teacher that are known.
  double top_k(KdProblem& q) {
    const KdTopK& t = p.plan->top_k;
    if (q.term[0].kind == kTeacherLabel) return known_label(q, t.values + row * t.k);
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
  double only(KdProblem& q, int64_t largest, double value) {
    q.term[0].kind = kForwardKL;
    const bool wants_hard = p.want_hard && label && !hard_is_had && is_plain();
    if (wants_hard && q.temperature == 1 && !p.plan->standardize && value == value)
      return with_label(q, largest);
    known[0] = {largest, 0, value == value ? 0 : (double)NAN, 0, 0};
    return of_known(q, 1, kRenormalize);
  }

  // And the label in the same sweep: of two classes by the shares that they have in the gradient.
  double with_label(KdProblem& q, int64_t largest) {
    const int64_t target = q.label(0);
    const int count = target == largest ? 1 : 2;
    const double of_soft = q.scales.soft_scale, of_hard = weight * p.scales.hard_scale;
    const double all = of_soft + of_hard;
    if (count == 1 || all == 0) {
      known[0] = {largest, 0, 0, 0, 0}, known[1] = {target, 0, -INFINITY, 0, 0};
    } else {
      known[0] = {largest, 0, log(of_soft / all), 0, 0};
      known[1] = {target, 0, log(of_hard / all), 0, 0};
    }
    q.scales.soft_scale = all;
    q.alpha = 1, q.want_hard = true;
    of_known(q, count, kRenormalize);
    hard_is_had = true, hard = weight * -known[count - 1].log_q;
    return q.soft_factor * -known[0].log_q;
  }

  double teacher_label(KdProblem& q) {
    const Real* const values = (const Real*)q.teacher;
    const Real highest = highest_or_nan(values, p.classes);
    return only(q, first_at(values, p.classes, highest), highest);
  }

  double known_label(KdProblem& q, const double* values) {
    const int64_t count = p.plan->top_k.k;
    const double highest = highest_or_nan(values, count);
    return only(q, p.plan->top_k.indices[row * count + first_at(values, count, highest)], highest);
  }

  double of_known(KdProblem& q, int64_t count, KdTail tail) {
    for (int64_t k = 0; k < count; ++k) known[k].logit = student.values[known[k].index];
    KnownRow<Real> of = {q, known, count, tail, student.values, target(), 0, 0, 0, 0, 0, 0};
    of.sweep();
    of.compare();
    const double value = q.soft_factor * of.value;
    if (sizeof(Real) == 4 && loss_at_risk(q, value, kError)) good = kNothing;
    if (p.grad && q.alpha > 0) of.write(q.scales.soft_scale);
    return value;
  }

  // The label's cross entropies at temperature 1.
  void look_at_label(const KdProblem& q, int view) {
    const Effective<Real> teacher = rows.teacher(view, 1, 0, teacher_row);
    ce_of_teacher = cross_entropy_at(teacher.values, p.classes, q.label(0));
    if (q.term[0].kind == kWeightedSoft)
      ce_of_student = cross_entropy_at(student.values, p.classes, q.label(0));
  }

  // The plain cross entropy in the place of the loss's.
  void without_options(KdProblem& q) const {
    q.weight = nullptr;
    q.label_smoothing = q.z_loss = 0;
    q.scales.weight_sum = (double)p.classes;
  }

  // NKD: the label's cross entropy by the teacher's share of it, at temperature 1; and that of the
  // others among themselves, of which decoupled distillation knows the gradient.
  double normalized(KdProblem& q, double base, double t2) {
    const double gamma = q.term[0].parameter, share = q.term[0].weight;
    const double at_label = q.soft_factor / t2 * share * exp(-ce_of_teacher);
    const Description<Real> others =
        describe((const Real*)q.teacher, p.classes, q.teacher_temperature, q.label(0));
    const bool any = others.sum > 0 || others.max != others.max;
    const double entropy = any && gamma != 0 ? others.entropy() : 0;
    const bool both = q.want_hard;  // the loss's own cross entropy is the same one
    double value, of_label, none;
    if (p.plan->standardize) {  // which the label's part is not
      of_label = cross_entropy(base * at_label, true);
      q.grad = p.grad ? target() : nullptr;
    } else {
      if (!both) without_options(q);
      q.want_hard = true, q.alpha = both ? q.alpha : 0.5;
      q.scales.hard_scale = base * at_label + (both ? weight * p.scales.hard_scale : 0);
    }
    q.decoupled = q.general = true;
    q.term[0] = {kDecoupled, share, 0, gamma, nullptr, nullptr};
    run(q, value, q.want_hard ? of_label : none);
    if (both) hard = weight * of_label;
    return at_label * of_label + value + q.soft_factor * share * gamma * entropy;
  }

  // WSLD: the soft labels' cross entropy, the less the better the student does beside the teacher.
  double weighted_soft(KdProblem& q) {
    const double w = -expm1(-ce_of_student / (ce_of_teacher + 1e-7)) * q.term[0].parameter;
    const Description<Real> of_p =
        describe((const Real*)q.teacher, p.classes, q.teacher_temperature, -1);
    q.soft_factor *= w * q.term[0].weight;
    q.scales.soft_scale *= w * q.term[0].weight;
    q.general = q.temperature != q.teacher_temperature;
    q.term[0] = {kForwardKL, 1, 0, 0, nullptr, nullptr};
    double value, of_label;
    run(q, value, of_label);
    if (q.want_hard) hard = weight * of_label;
    return value + (w == 0 ? 0 : q.soft_factor * of_p.entropy());
  }

  void measure() {
    double* const out = p.plan->metrics + 4 * row;
    const Description<Real> of_q = describe(student.values, p.classes, 1, -1);
    const int64_t guess = first_at(student.values, p.classes, (Real)of_q.max);
    out[0] = of_q.entropy();
    if (p.plan->top_k.k > 0) {
      measure_top_k(out, guess);
    } else {
      const Effective<Real> teacher = mean_teacher();
      const Description<Real> of_p = describe(teacher.values, p.classes, 1, -1);
      out[1] = of_p.entropy();
      out[2] = first_at(teacher.values, p.classes, (Real)of_p.max) == guess;
    }
    out[3] = label && p.label(row) == guess;
  }

  Effective<Real> mean_teacher() {
    KdProblem q = p;
    KdPlan plan = *p.plan;
    if (plan.ensemble == kOfLosses) plan.ensemble = kOfProbabilities;
    q.plan = &plan;
    return Rows<Real>{q, row, rows.wide, rows.other}.teacher(0, 1, 0, teacher_row);
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
    if (plan.standardize) of_student = spread_of(student.values, p.classes);
    for (int k = 0; k < plan.passes; ++k)
      if (plan.pass[k].added || p.want_soft)
        for (int view = 0; view < rows.views(); ++view) visit_pass(plan.pass[k], view);
    if (p.want_hard && label && !hard_is_had)
      hard = weight * cross_entropy(weight * p.scales.hard_scale, is_plain());
    if (plan.metrics) measure();
    if (p.grad && !begun) memset(total, 0, p.classes * sizeof(Real));
    if (sizeof(Real) == 8 || good != kAll || !p.grad || squares == 0) return good;
    return 4 * sum_of_squares(total, p.classes) < squares ? kLoss : kAll;
  }

  // The gradient of the logits as they came, in blocks: in place they are read for the last time.
  void finish() {
    char* const out = (char*)p.grad + p.grad_rows.start(row) * element_size(p.student_dtype);
    const Mapping mapping = rows.of_student();
    if (!mapping.is_identity()) {
      copy_of(rows.student_row(), p.student_dtype, p.classes, rows.wide);
      each<double>(p.classes, [&](int64_t i, auto part) __attribute__((always_inline)) {
        part.put(rows.wide + i, mapping.slope(part.get(rows.wide + i, 0.0), i, part));
      });
      for (int64_t i = 0; i < p.classes; ++i) total[i] = (Real)(total[i] * rows.wide[i]);
    }
    if ((char*)total != out) store_block(total, p.classes, p.student_dtype, out, 0, false);
  }

  void put_terms() const { p.soft[row] = soft, p.hard[row] = hard, p.added[row] = added; }
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
