// A row of whatever a plan asks for: the passes of csrc/cpu/passes.inl by a block of threads, all
// in double. Each pass leaves its gradient in a row of scratch memory, which is added to that of
// the passes before it; the last step leads the sum back through what was done to the logits.
#pragma once
#include "compared.cuh"

namespace {

constexpr int kRowsOfScratch = 4;

class GeneralRow {
 public:
  struct Terms {
    double soft, hard, added;
  };

  KD_DEVICE GeneralRow(const KdGeneralProblem& problem, const KdGeneralScales& the_scales,
                       const Classes& the_classes, double* scratch)
      : p(problem),
        plan(problem.plan),
        scales(the_scales),
        classes(the_classes),
        logits(problem, the_classes),
        rows{{}, {}, scratch},
        state(block_shared<State>()) {}

  // Its terms, for the thread that leads, and in memory its gradient.
  KD_DEVICE Terms visit(int64_t the_row) {
    row = the_row;
    const double weight = p.row_weight(row);
    if (!p.soft_active(row) || weight == 0) {  // not even read: it may hold NaN
      if (p.grad) classes.each([&](int64_t i) { put_gradient(i, 0); });
      return {0, 0, 0};
    }
    begin(weight);
#pragma unroll 1
    for (int k = 0; k < plan.passes; ++k)
      if (plan.pass[k].added || p.want_soft)
#pragma unroll 1
        for (int view = 0; view < logits.views(); ++view) visit_pass(plan.pass[k], view);
    add_cross_entropy();
    if (plan.metrics) measure();
    if (p.grad) finish();
    return state.terms;
  }

 private:
  // What all threads know of the row, in the block's memory, as registers are few. One writes it.
  struct State {
    Terms terms;
    double weight;          // of the sample
    double of_label_alone;  // of the gradient of the label's plain cross entropy
    Spread of_student;
    // Of the pass.
    Look look;
    double square;            // T^2, or 1
    double factor, constant;  // of its value; beside it, where the gradient has no part of it
  };

  KD_DEVICE void begin(double weight) {
    has_label = p.hard_active(row);
    label = has_label ? p.label(row) : 0;
    bad_label = label < 0 || label >= p.classes;
    spoilt = begun = false;
    rows.student = logits.student(row, scratch_row(1));
    const Spread of_student = plan.standardize ? logits.spread_of(rows.student) : Spread{};
    if (classes.leads()) {
      state.terms = {0, 0, 0};
      state.weight = weight, state.of_label_alone = 0;
      state.of_student = of_student;
    }
    classes.sync();
  }

  KD_DEVICE double* scratch_row(int k) const { return rows.v + k * p.scratch_row; }
  KD_DEVICE double* total() const { return scratch_row(3); }  // of the passes' gradients

  // ---- a pass -----------------------------------------------------------------------------------

  KD_DEVICE static bool is_decoupled(const KdTerm& t) {
    return t.kind == kDecoupled || t.kind == kNormalized;
  }
  // Of a term that has the pass for itself; of a mixture each has its own.
  KD_DEVICE double weight_of(const KdTerm& t) const {
    if (!is_decoupled(t) && t.kind != kWeightedSoft && t.kind != kTeacherLabel) return 1;
    return t.row_weight ? t.row_weight[row] : t.weight;
  }
  // Of the gradients of its passes.
  KD_DEVICE double base_of(const KdPass& pass) const {
    return pass.added ? scales.added_scale : scales.plan_scale;
  }

  KD_DEVICE void visit_pass(const KdPass& pass, int view) {
    const KdTerm& first = plan.term[pass.first];
    if (bad_label && (is_decoupled(first) || first.kind == kWeightedSoft)) {
      if (classes.leads()) state.terms.soft = NAN;
      spoilt = spoilt || base_of(pass) != 0;
      return;
    }
    if (weight_of(first) == 0) return;  // a term of weight zero is no part of the loss
    const bool standardize = plan.standardize && !pass.added;
    classes.sync();  // the pass before is done
    if (classes.leads()) look_at(pass, logits.weight_of(view));
    classes.sync();
    // NKD and WSLD look at the label at temperature 1 before. One call, as it is much code.
    const bool at_one = first.kind == kNormalized || first.kind == kWeightedSoft;
#pragma unroll 1
    for (int step = at_one ? 0 : 1; step < 2; ++step) {
      rows.teacher = logits.teacher(row, view, step == 0 ? 1 : state.look.teacher_temperature,
                                    step == 1 && standardize, rows.student, scratch_row(2), rows.v);
      if (step == 0) look_at_label(first, base_of(pass));
    }
    double value;
    if (is_decoupled(first)) {
      value = Decoupled{first}.compare(p, classes, rows, state.look, label);
    } else {
      if (first.kind == kWeightedSoft && state.factor != 0) add_entropy();
      if (first.kind == kTeacherLabel) decide();
      value = Mixture(p, classes, logits, rows, state.look).compare(row);
    }
    if (classes.leads())
      (pass.added ? state.terms.added : state.terms.soft) += state.factor * value + state.constant;
    if (p.grad && base_of(pass) != 0)
      add_gradient(base_of(pass) * state.factor / state.look.temperature, standardize);
  }

  // The pass in this row.
  KD_DEVICE void look_at(const KdPass& pass, double share) {
    const KdTerm& first = plan.term[pass.first];
    const double* const own = pass.added ? nullptr : plan.row_temperature;
    const double nominal = own ? own[row] : pass.temperature;
    const bool same = pass.temperature == pass.teacher_temperature;
    const bool standardize = plan.standardize && !pass.added;
    const bool forward = first.kind == kWeightedSoft || first.kind == kTeacherLabel;
    state.look = {&first, pass.terms, forward,
                  standardize ? nominal * state.of_student.divisor() : nominal,
                  same ? nominal : pass.teacher_temperature};
    state.square = plan.scale_by_t2 && !pass.added ? nominal * nominal : 1;
    state.factor = state.square * pass.weight * share * state.weight;
    state.factor *= weight_of(first);
    state.constant = 0;
  }

  // What NKD and WSLD make of the label's cross entropies at temperature 1.
  KD_DEVICE void look_at_label(const KdTerm& term, double base) {
    const double of_student = label_cross_entropy(rows.student);
    const double of_teacher = label_cross_entropy(rows.teacher);
    if (!classes.leads()) return;
    if (term.kind == kWeightedSoft) {
      state.factor *= -expm1(-of_student / (of_teacher + 1e-7)) * term.parameter;
      return;
    }
    const double at_label = state.factor / state.square * exp(-of_teacher);
    state.of_label_alone += base * at_label;
    state.constant = at_label * of_student;
  }

  KD_DEVICE void add_entropy() {
    const double entropy = entropy_at(rows.teacher, state.look.teacher_temperature);
    if (classes.leads()) state.constant = state.factor * entropy;
  }

  // The teacher's row as if its first largest class were all that it says.
  KD_DEVICE void decide() {
    const int64_t first = classes.first_largest(rows.teacher);
    rows.teacher = classes.write(scratch_row(2), [&](int64_t i) {
      return first < 0 ? NAN : i == first ? 0 : -INFINITY;
    });
  }

  // -log of the label's probability at temperature 1, by its log-odds: no digit is lost where that
  // is nearly 1.
  KD_DEVICE double label_cross_entropy(const Row& of) const {
    const Softmax& others =
        classes.softmax_of_some<1>(of, 1, [&](int64_t i) { return i != label; });
    return softplus(-others.log(of[label]));
  }

  KD_DEVICE double entropy_at(const Logits& of, double temperature) const {
    return entropy(classes, of, classes.softmax<2>(of, temperature));
  }

  // ---- gradient ---------------------------------------------------------------------------------

  // Of the passes so far.
  KD_DEVICE double before(int64_t i) const { return begun ? total()[i] : 0; }

  // The pass's is in rows.v.
  KD_DEVICE void add_gradient(double scale, bool standardized) {
    double along = 0;
    // A standardised row has a temperature of its own, which its logits change, too.
    const Spread& of_student = state.of_student;
    if (standardized && of_student.deviation != 0) {
      const double dot = classes.sum([&](int64_t i) {
        const double x = rows.student[i];
        return x == -INFINITY ? 0 : rows.v[i] * of_student.centred(x);
      });
      along = dot / (of_student.divisor() * of_student.deviation * of_student.degrees);
    }
    classes.each([&](int64_t i) {
      const double x = rows.student[i];
      const double own = along == 0 || x == -INFINITY ? 0 : along * of_student.centred(x);
      total()[i] = before(i) + scale * (rows.v[i] - own);
    });
    begun = true;
  }

  // With the labels: the loss's own, and what NKD has beside it without its options.
  KD_DEVICE void add_cross_entropy() {
    const bool wanted = p.want_hard && has_label;
    if (wanted && bad_label) {
      if (classes.leads()) state.terms.hard = NAN;
      spoilt = spoilt || p.alpha != 1;
      return;
    }
    if (!wanted && state.of_label_alone == 0) return;
    const Softmax& r = classes.softmax<1>(rows.student, 1);
    if (wanted) {
      const double loss = hard_loss(r.log_total());
      if (classes.leads()) state.terms.hard = state.weight * loss;
    }
    const double scale = wanted && p.alpha != 1 ? state.weight * scales.hard_scale : 0;
    if (p.grad && (scale != 0 || state.of_label_alone != 0)) add_hard_gradient(r, scale);
  }

  KD_DEVICE double smooth() const { return p.label_smoothing / static_cast<double>(p.classes); }
  KD_DEVICE double share_of_label() const { return (1 - p.label_smoothing) * class_weight(label); }
  KD_DEVICE double class_weight(int64_t i) const { return p.weight ? p.weight[i] : 1; }

  KD_DEVICE double hard_loss(double log_sum) const {
    const double loss =
        share_of_label() * (log_sum - rows.student[label]) + p.z_loss * log_sum * log_sum;
    if (!(p.label_smoothing > 0)) return loss;
    const double smoothed =
        classes.sum([&](int64_t i) { return class_weight(i) * rows.student[i]; });
    return loss + smooth() * (scales.weight_sum * log_sum - smoothed);
  }

  KD_DEVICE void add_hard_gradient(const Softmax& r, double scale) {
    const double at_label = scale * share_of_label() + state.of_label_alone;
    // Of every r: what smoothing and z-loss add to the label's share.
    const double more = scale * (smooth() * scales.weight_sum + 2 * p.z_loss * r.log_total());
    const double smoothed = scale * smooth();
    const bool sure = r.is_sure() && rows.student[label] == r.max;
    double others = 0;  // than the label
    if (sure)
      others = classes.sum([&](int64_t i) { return i == label ? 0 : exp(r.log(rows.student[i])); });
    classes.each([&](int64_t i) {
      double g = (at_label + more) * exp(r.log(rows.student[i]));
      if (i == label) g = sure ? more - (at_label + more) * others : g - at_label;  // r - 1 cancels
      total()[i] = before(i) + g - smoothed * class_weight(i);
    });
    begun = true;
  }

  // Of the logits as they came: in place they are read for the last time.
  KD_DEVICE void finish() const {
    const Mapping mapping = logits.of_student();
    const bool as_it_is = mapping.is_identity();
    const Row source = logits.source(row);
    classes.sync();  // what is overwritten may be the label's logit, at which all have looked
    classes.each([&](int64_t i) {
      const double slope = as_it_is ? 1 : mapping.slope(source[i], i);
      put_gradient(i, spoilt ? NAN : before(i) * slope);
    });
  }
  KD_DEVICE void put_gradient(int64_t i, double value) const {
    put_value(p.grad, p.student_dtype, p.grad_rows.start(row) + i, value);
  }

  // ---- metrics ----------------------------------------------------------------------------------

  KD_DEVICE void measure() const {
    const Logits teacher = logits.mean_teacher(row, rows.student, scratch_row(2), rows.v);
    const double of_q = entropy_at(rows.student, 1), of_p = entropy_at(teacher, 1);
    const int64_t guess = classes.first_largest(rows.student);
    const int64_t its_guess = classes.first_largest(teacher);
    if (!classes.leads()) return;
    double* const out = plan.metrics + 4 * row;
    out[0] = of_q, out[1] = of_p;
    out[2] = guess == its_guess;
    out[3] = has_label && label == guess;
  }

  const KdGeneralProblem& p;
  const KdPlan& plan;
  const KdGeneralScales& scales;
  const Classes& classes;
  const Effective logits;
  Rows rows;
  State& state;

  // Of the row at hand.
  int64_t row, label;
  bool has_label, bad_label;
  bool spoilt;  // its gradient is NaN
  bool begun;   // total holds something
};

}  // namespace
