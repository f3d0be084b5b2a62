// Decoupled distillation (Zhao et al. 2022, arXiv:2203.08679): the binary divergence between the
// label and all else, and the divergence among all else. The sweeps see a row whose label is
// masked; what belongs to the label is added by its log-odds: 1 - q_y formed by a subtraction would
// be 0. Included inside an anonymous namespace, after jobs.inl has said what a Job is.

// The row's terms and the factors of its gradient, but for the label's entry and what is in `job`.
template <typename Real>
void conclude_decoupled(const KdProblem& p, Job<Real>& job) {
  const Sums<Real>& sums = job.sums;
  const KdTerm& term = p.term[0];
  const double t = p.temperature, k = p.scales.soft_scale * term.weight;
  const double student_max = reference_of(sums.student_max);
  const Odds q(log_odds(job.at_label, student_max, t, sums.student));
  const Odds of_p(log_odds(job.teacher_at_label, reference_of(sums.teacher_max), t, sums.teacher));
  // Of the two differences the one that does not cancel.
  const double more = q.is > 0.5 ? of_p.is_not - q.is_not : q.is - of_p.is;
  double target = divergence_of(of_p.is, of_p.log_is, q.log_is) +
                  divergence_of(of_p.is_not, of_p.log_is_not, q.log_is_not);
  double rest = sums.teacher == 0 ? 0 : divergence(p, sums) / p.soft_factor;
  const bool apart = sums.student == 0 && sums.teacher > 0;
  if ((sums.masked && rest == rest) || apart) rest = INFINITY;
  if (target < 0) target = 0;  // rounding
  // Where the teacher has nothing but the label, all else has no part in it.
  const double alpha = term.parameter, beta = sums.teacher == 0 ? 0 : term.second;
  job.good = kAll;
  job.f = {};
  if (p.want_soft) {
    double loss = 0;  // a term of weight zero is no part of the loss
    if (alpha != 0) loss += alpha * target;
    if (beta != 0) loss += beta * rest;
    p.soft[job.row] = p.soft_factor * term.weight * loss;
    const double off = kError * fabs(term.weight) * (fabs(alpha) + fabs(beta));
    if (!loss_is_exact(p, sums, p.soft[job.row], off)) job.good = kNothing;
  }
  job.more = job.label_off = 0;  // whatever the teacher is, if it has no share
  if (p.alpha > 0) {
    job.more = k * alpha * more;
    job.label_off = k * alpha * q.is * q.is_not;
    job.f.student = sums.student > 0 ? (k * beta - job.more) / sums.student : 0;
    job.f.teacher = sums.teacher > 0 ? k * beta / sums.teacher : 0;
  }
  if (job.power == kNoCrossEntropy) return;
  const double w = p.weight ? p.weight[job.label] : 1.0;
  const Odds r(log_odds(job.at_label, student_max, 1, sums.hard));
  p.hard[job.row] = -w * r.log_is;
  job.f.label = p.scales.hard_scale * w * r.is_not;
  job.f.hard = sums.hard > 0 ? job.f.label / sums.hard : 0;
}

// The label's entry of the gradient, and that of a class that is nearly all of the others.
template <typename Real, int P>
void single_out_decoupled(const KdProblem& p, Job<Real>& job) {
  const Factors& f = job.f;
  const bool hard = P != kNoCrossEntropy;
  Real* const es = job.place.es;
  job.sure = sure_class<Real, P>(p, job.sums, es, job.scratch);
  job.entries[0] = {job.label, job.more - (hard ? f.label : 0)};
  job.entries[1] = {job.sure.index, 0};
  if (job.sure.index >= 0) {
    // Where all the others' mass is, both shares are 1 less something.
    const double beta = f.teacher * job.sums.teacher;
    const double soft =
        f.teacher == 0 ? 0
                       : f.teacher * job.sure.teacher - beta * job.sure.student / job.sums.student;
    job.entries[1].gradient = soft - job.more / job.sums.student + (hard ? f.hard : 0);
  }
  job.squares = 0;
  for (const Entry& e : job.entries) {
    if (e.index < 0) continue;
    es[e.index] = job.scratch.teacher[e.index] = 0;
    if (P == kOwnExponential) job.scratch.hard[e.index] = 0;
    job.squares += e.gradient * e.gradient;
  }
}

// The squared error of the soft term's gradient, in roundings.
template <typename Real>
double decoupled_error(const Job<Real>& job) {
  const bool sured = job.sure.index >= 0;
  const double student = job.f.student * job.sums.student,
               teacher = job.f.teacher * job.sums.teacher;
  const double q = sured ? squared(job.sure.student, job.sums.student) : squared(job.sums.student);
  const double t = sured ? squared(job.sure.teacher, job.sums.teacher) : squared(job.sums.teacher);
  const double others =
      (student == 0 ? 0 : student * student * q) + (teacher == 0 ? 0 : teacher * teacher * t);
  return others + 16 * job.label_off * job.label_off;
}
