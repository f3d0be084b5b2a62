// Rows side by side: what one of them waits for (its maxima, a logarithm, a division) the others
// compute, and what is drawn from their sums is computed with a row in each lane. Included inside
// an anonymous namespace, after jobs.inl.

constexpr int kGroup = 16;

// Rows of few classes are computed side by side from the logits on: narrow.inl.
constexpr int kRows = Lanes<float>::kCount;
// From about there on a row fills its own vectors: see benchmarks/NOTES.md.
constexpr int64_t kNarrow = 128;

inline bool is_narrow(const KdProblem& p) { return p.classes <= kNarrow && !p.in_double; }

// How many rows go together: their scratch rows together are one block.
inline int group_size(const KdProblem& p) {
  const int64_t place = (p.classes + 15) / 16 * 16, fit = kBlock / place;
  if (p.in_double || p.general || fit < 2) return 1;
  return is_narrow(p) ? kRows : fit < kGroup ? (int)fit : kGroup;
}

struct RowSums {
  Vec<double> student, teacher, cross, hard, smooth;
};
struct RowOthers {
  Vec<double> student, teacher, hard;
};

// Rows of one kind: all of them have a cross entropy, or none has.
struct Group {
  int count;
  Power power;
  int64_t row[kGroup], label[kGroup];
  Good good[kGroup];
  bool odd[kGroup];  // a logit that is no number, or a class masked by the student: done alone

  // Filled in by whoever sums; as Sums, Factors and Sure name them.
  alignas(64) double student[kGroup], teacher[kGroup], cross[kGroup], hard[kGroup], smooth[kGroup];
  alignas(64) double max[kGroup], at_label[kGroup], weight[kGroup];
  alignas(64) double label_student[kGroup], label_teacher[kGroup], label_hard[kGroup];
  alignas(64) double others_student[kGroup], others_teacher[kGroup], others_hard[kGroup];
  alignas(64) double sure[kGroup], on_label[kGroup];  // the sure class or -1; 1 if it is the label
  alignas(64) double sure_weight[kGroup], squares[kGroup];

  // Drawn from those.
  alignas(64) double soft[kGroup], entropy[kGroup];
  alignas(64) double of_q[kGroup], of_p[kGroup], of_r[kGroup], of_label[kGroup];
  alignas(64) double label_entry[kGroup], sure_entry[kGroup], risk[kGroup];
  double of_smooth, smooth_total;

  Power gradient_power(const KdProblem& p) const { return gradient_power_of(p, power); }
  RowSums sums(int k) const {
    return {load(student + k), load(teacher + k), load(cross + k), load(hard + k),
            load(smooth + k)};
  }
  RowOthers others(int k) const {
    return {load(others_student + k), load(others_teacher + k), load(others_hard + k)};
  }
  FactorsOf<Vec<double>> factors(int k) const {
    return {load(of_q + k), load(of_p + k), load(of_r + k),
            of_smooth,      smooth_total,   load(of_label + k)};
  }
  Factors factors_of(int k) const {
    return {of_q[k], of_p[k], of_r[k], of_smooth, smooth_total, of_label[k]};
  }
};

constexpr int kLanes = Lanes<double>::kCount;

// What is read of a label before its logits may be overwritten.
inline void look_up_labels(const KdProblem& p, Group& group) {
  if (group.power == kNoCrossEntropy) return;
  for (int k = 0; k < group.count; ++k) {
    group.label[k] = p.label(group.row[k]);
    group.weight[k] = p.weight ? p.weight[group.label[k]] : 1.0;
  }
}

// The terms of the rows, and the factors of their gradients.
void conclude(const KdProblem& p, Group& group) {
  typedef Vec<double> D;
  for (int k = 0; k < group.count; k += kLanes) {
    const RowSums sums = group.sums(k);
    FactorsOf<D> f = {};
    D risk = {};
    if (p.want_soft) {
      const D soft = divergence(p, sums);
      store(group.soft + k, soft);
      risk = loss_at_risk(p, soft, kError) ? splat<double>(1) : D{};
    }
    store(group.risk + k, risk);
    if (p.alpha > 0) soft_factors(p.scales, sums, f);
    if (group.power != kNoCrossEntropy)
      store(group.entropy + k, cross_entropy(p, p.scales, sums, load(group.max + k),
                                             load(group.weight + k), load(group.at_label + k), f));
    store(group.of_q + k, f.student);
    store(group.of_p + k, f.teacher);
    store(group.of_r + k, f.hard);
    store(group.of_label + k, f.label);
    group.of_smooth = f.smooth;
    group.smooth_total = f.smooth_total;
  }
  for (int k = 0; k < group.count; ++k) {
    if (group.odd[k]) continue;
    group.good[k] = group.risk[k] == 0 ? kAll : kNothing;
    if (p.want_soft) p.soft[group.row[k]] = group.soft[k];
    if (group.power != kNoCrossEntropy) p.hard[group.row[k]] = group.entropy[k];
  }
}

// The entries of the gradients that cancel: the label's, and that of a class the student is sure
// of.
void single_out(const KdProblem& p, Group& group) {
  typedef Vec<double> D;
  const bool hard = group.gradient_power(p) != kNoCrossEntropy;
  for (int k = 0; k < group.count; k += kLanes) {
    const FactorsOf<D> f = group.factors(k);
    if (hard)
      store(group.label_entry + k,
            label_gradient(f, load(group.weight + k), load(group.label_student + k),
                           load(group.label_teacher + k), load(group.label_hard + k)));
    store(group.sure_entry + k, sure_gradient(f, group.others(k), hard, load(group.sure_weight + k),
                                              load(group.on_label + k) != 0.0));
  }
}

// Whose gradient float32 was not enough for.
void judge(const KdProblem& p, Group& group) {
  typedef Vec<double> D;
  const bool hard = group.gradient_power(p) != kNoCrossEntropy;
  for (int k = 0; k < group.count; k += kLanes) {
    const D squares = load(group.squares + k);
    const auto sured = load(group.sure + k) >= 0.0;
    const FactorsOf<D> f = group.factors(k);
    const D error = soft_error(group.sums(k), f, sured, group.others(k));
    const auto at_risk =
        gradient_at_risk(p, group.sums(k), f, hard, sured, group.others(k), error, squares, kError);
    D risk = at_risk ? splat<double>(1) : D{};
    if (!hard) {  // teacher = student
      risk = squares == 0.0 ? (load(group.cross + k) == 0.0 ? D{} : risk) : risk;
    }
    store(group.risk + k, risk);
  }
  for (int k = 0; k < group.count; ++k)
    if (group.good[k] == kAll && group.risk[k] != 0) group.good[k] = kLoss;
}

// ---- rows that fill vectors of their own ------------------------------------------------------

struct Wide {
  Scratch<float> scratch[kGroup];
  Place<float> place[kGroup];
  float maxima[kGroup][2];
  const float *students[kGroup], *teachers[kGroup];  // the rows themselves, or the copies
  Sums<float> sums[kGroup];
};

// The maxima of a row.
inline void survey(const KdProblem& p, Group& group, Wide& wide, int k) {
  const int64_t row = group.row[k];
  const Scratch<float>& scratch = wide.scratch[k];
  const auto* const student =
      (const char*)p.student + p.student_rows.start(row) * element_size(p.student_dtype);
  const auto* const teacher =
      (const char*)p.teacher + p.teacher_rows.start(row) * element_size(p.teacher_dtype);
  const Block<float> s = survey(student, p.student_dtype, 0, p.classes, scratch.student);
  const Block<float> t = survey(teacher, p.teacher_dtype, 0, p.classes, scratch.teacher);
  wide.students[k] = s.values;
  wide.teachers[k] = t.values;
  wide.sums[k] = {s.high, t.high, 0, 0, 0, 0, 0, false};
  scratch.student_max[0] = s.high;
  scratch.teacher_max[0] = t.high;
  group.odd[k] =
      !(s.low > -INFINITY && s.high < INFINITY && t.high < INFINITY && t.high > -INFINITY);
}

template <int P>
void collect(const KdProblem& p, const Exponent<float>& exponent, Group& group, Wide& wide, int k) {
  const auto sweep = p.grad ? exponentials<float, P, true> : exponentials<float, P, false>;
  Sums<float>& sums = wide.sums[k];
  const Scratch<float>& scratch = wide.scratch[k];
  Ahead nothing = {};
  if (P != kNoCrossEntropy && p.label_smoothing > 0)
    sums.smooth = weighted_sum(p, wide.students[k], 0, p.classes);
  sweep(wide.students[k], wide.teachers[k], p.classes, exponent, exponent, sums, wide.place[k].es,
        scratch.teacher, scratch.hard, nothing);
  const double all = sums.student + sums.teacher + sums.cross + sums.hard + sums.smooth;
  group.odd[k] |= !(all - all == 0);
  group.student[k] = sums.student;
  group.teacher[k] = sums.teacher;
  group.cross[k] = sums.cross;
  group.hard[k] = sums.hard;
  group.smooth[k] = sums.smooth;
  group.max[k] = sums.student_max;
}

// The exponentials that single_out needs. They are blanked out of the sweep; long before it, as a
// vector that is loaded right after one of its lanes was stored waits for that store.
template <int P>
void look_up(const KdProblem& p, Group& group, const Wide& wide, int k) {
  const Scratch<float>& scratch = wide.scratch[k];
  float* const es = wide.place[k].es;
  const auto blank = [&](int64_t index) {
    es[index] = scratch.teacher[index] = 0;
    if (P == kOwnExponential) scratch.hard[index] = 0;
  };
  const Sure sure = sure_class<float, P>(p, wide.sums[k], es, scratch);
  group.sure[k] = (double)sure.index;
  group.others_student[k] = sure.student;
  group.others_teacher[k] = sure.teacher;
  group.others_hard[k] = sure.hard;
  group.sure_weight[k] = p.weight && sure.index >= 0 ? p.weight[sure.index] : 1.0;
  group.on_label[k] = 0;
  if (P != kNoCrossEntropy) {
    const int64_t label = group.label[k];
    group.label_student[k] = es[label];
    group.label_teacher[k] = scratch.teacher[label];
    group.label_hard[k] = P == kOwnExponential ? scratch.hard[label] : power<P>(es[label]);
    group.on_label[k] = sure.index == label;
    blank(label);
  }
  if (sure.index >= 0) blank(sure.index);
}

// The gradient but for the entries that cancel.
template <int P>
void sweep(const KdProblem& p, Group& group, const Wide& wide, int k) {
  const Factors f = group.factors_of(k);
  double squares = sweep2<float, P>(p, wide.sums[k], f, wide.place[k], wide.scratch[k]);
  const auto count = [&](double weight, double gradient) {
    squares += gradient * gradient - f.smooth * weight * (f.smooth * weight);
  };
  if (P != kNoCrossEntropy && !group.on_label[k]) count(group.weight[k], group.label_entry[k]);
  if (group.sure[k] >= 0) count(group.sure_weight[k], group.sure_entry[k]);
  group.squares[k] = squares;
}

// What the sweep left out.
inline void finish(const KdProblem& p, const Group& group, const Wide& wide, int k) {
  const Place<float>& place = wide.place[k];
  if (place.later) store_block(place.es, p.classes, p.student_dtype, place.grad, 0, false);
  const auto put_entry = [&](int64_t index, double gradient) {
    const float value = (float)gradient;
    store_block(&value, 1, p.student_dtype, place.grad, index, false);
  };
  if (group.gradient_power(p) != kNoCrossEntropy) put_entry(group.label[k], group.label_entry[k]);
  if (group.sure[k] >= 0) put_entry((int64_t)group.sure[k], group.sure_entry[k]);
}

struct WideSteps {
  void (*collect)(const KdProblem&, const Exponent<float>&, Group&, Wide&, int);
  void (*look_up)(const KdProblem&, Group&, const Wide&, int);
  void (*sweep)(const KdProblem&, Group&, const Wide&, int);
};
template <int P>
constexpr WideSteps kWideSteps = {collect<P>, look_up<P>, sweep<P>};

inline const WideSteps& wide_steps_of(Power power) {
  switch (power) {
    case kNoCrossEntropy:
      return kWideSteps<kNoCrossEntropy>;
    case kFirst:
      return kWideSteps<kFirst>;
    case kSecond:
      return kWideSteps<kSecond>;
    case kThird:
      return kWideSteps<kThird>;
    case kFourth:
      return kWideSteps<kFourth>;
    default:
      return kWideSteps<kOwnExponential>;
  }
}

void visit_wide(const KdProblem& p, Group& group, char* memory) {
  Wide wide;
  const Scratch<float> whole = scratch_of<float>(p, memory);
  const int64_t size = (p.classes + 15) / 16 * 16;  // a place of its own, for converted logits, too
  look_up_labels(p, group);
  for (int k = 0; k < group.count; ++k) {
    wide.scratch[k] = {whole.student + k * size,
                       whole.teacher + k * size,
                       whole.hard + k * size,
                       wide.maxima[k],
                       wide.maxima[k] + 1,
                       nullptr,
                       nullptr,
                       nullptr};
    wide.place[k] = place_of(p, group.row[k], wide.scratch[k]);
    if (group.power != kNoCrossEntropy)
      group.at_label[k] = logit_of<float>(p, group.row[k], group.label[k]);
    survey(p, group, wide, k);
  }
  const Exponent<float> exponent(kLog2E / p.temperature);
  for (int k = 0; k < group.count; ++k)
    wide_steps_of(group.power).collect(p, exponent, group, wide, k);
  conclude(p, group);
  if (!p.grad) return;
  const auto good = [&](int k) { return !group.odd[k] && group.good[k] == kAll; };
  const WideSteps& steps = wide_steps_of(group.gradient_power(p));
  for (int k = 0; k < group.count; ++k)
    if (good(k)) steps.look_up(p, group, wide, k);
  single_out(p, group);
  for (int k = 0; k < group.count; ++k)
    if (good(k)) steps.sweep(p, group, wide, k);
  judge(p, group);
  for (int k = 0; k < group.count; ++k)
    if (good(k)) finish(p, group, wide, k);
}
