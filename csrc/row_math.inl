// The maths of one row once its sums are known: its two terms, the factors of its gradient, and
// whether float32 is enough for them. The same code on the CPU and on the GPU, and for one row (D
// is double) or for several, a row in each lane of a vector. Included inside an anonymous
// namespace, after math.h and problem.h, and after the vectors, if there are any.

KD_INLINE double natural_log(double x) { return log(x); }

// A product rounded where it stands: contracting a*x - b*y into one FMA rounds only one of the two,
// and teacher = student would leave a gradient of rounding errors instead of 0. The CUDA units are
// compiled without contraction.
template <typename V>
KD_INLINE V rounded(V v) {
#if defined(__CUDACC__)
#elif defined(__x86_64__) || defined(__i386__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

template <typename Real>
KD_INLINE Real reference_of(Real max) {
  return max == -INFINITY ? 0 : max;
}

// Sums over the classes of a row, relative to its maxima.
template <typename Real>
struct Sums {
  Real student_max, teacher_max;
  double student;               // sum e^((s - max)/T)
  double teacher;               // sum e^((t - max)/T)
  double cross;                 // sum e^((t - max)/T) * ((t - max) - (s - max))
  double hard;                  // sum e^(s - max)
  double smooth;                // sum w * s, for label smoothing
  bool masked;                  // the student has -inf where the teacher has mass
  bool teacher_masked = false;  // the reverse, where it matters
};

// Moves the sums over to new maxima, so that the next block can be added.
template <typename Real>
KD_INLINE void raise_maxima(Sums<Real>& sums, Real student_max, Real teacher_max, double inverse_t,
                            double teacher_inverse_t) {
  if (student_max > sums.student_max) {
    double step = (double)student_max - reference_of(sums.student_max);
    double seen = sums.student_max == -INFINITY ? 0.0 : 1.0;  // e^step of a -inf may overflow
    sums.student *= seen == 0 ? 0.0 : exp(-step * inverse_t);
    sums.hard *= seen == 0 ? 0.0 : exp(-step);
    sums.cross += sums.teacher * step;
    sums.student_max = student_max;
  }
  if (teacher_max > sums.teacher_max) {
    double step = (double)teacher_max - reference_of(sums.teacher_max);
    double factor = sums.teacher_max == -INFINITY ? 0.0 : exp(-step * teacher_inverse_t);
    sums.cross = factor == 0 ? 0.0 : factor * (sums.cross - sums.teacher * step);
    sums.teacher *= factor;
    sums.teacher_max = teacher_max;
  }
}

// What a row's exponentials are multiplied with to make its gradient.
template <typename D>
struct FactorsOf {
  D student, teacher;   // of q and p
  D hard;               // of r
  double smooth;        // of the class weights: -epsilon / C
  double smooth_total;  // the same summed over the classes, without its sign
  D label;              // taken off at the label
};
typedef FactorsOf<double> Factors;

// The forward KL, scaled, of sums that are finite, or NaN.
template <typename S>
KD_INLINE auto divergence(const KdLoss& p, const S& sums) {
  auto kl = sums.cross / (sums.teacher * p.temperature) + natural_log(sums.student / sums.teacher);
  return p.soft_factor * (kl < 0.0 ? decltype(kl){} : kl);  // rounding; KL is not negative
}

template <typename Real>
KD_INLINE double soft_loss(const KdLoss& p, const Sums<Real>& sums) {
  const double loss = divergence(p, sums);
  if (!(sums.student > 0)) return NAN;  // every class masked: no distribution
  return sums.masked && loss == loss ? INFINITY : loss;
}

template <typename S, typename D>
KD_INLINE void soft_factors(const KdScales& scales, const S& sums, FactorsOf<D>& f) {
  f.student = scales.soft_scale / sums.student;
  f.teacher = scales.soft_scale / sums.teacher;
}

// The cross entropy, and its factors of the gradient. Of the label: its weight, its logit.
template <typename S, typename D>
KD_INLINE D cross_entropy(const KdLoss& p, const KdScales& scales, const S& sums, D max, D w,
                          D at_label, FactorsOf<D>& f) {
  const double epsilon = p.label_smoothing, smooth = epsilon / (double)p.classes;
  f.smooth = -scales.hard_scale * smooth;
  f.smooth_total = scales.hard_scale * smooth * scales.weight_sum;
  f.label = scales.hard_scale * (1 - epsilon) * w;
  const D lse = natural_log(sums.hard);
  D loss = (1 - epsilon) * w * (lse - (at_label - max));
  if constexpr (sizeof(D) == sizeof(double))  // rows side by side have no z-loss
    if (p.z_loss > 0) {
      const double absolute = lse + max + p.logit_shift;
      loss += p.z_loss * absolute * absolute;
      f.smooth_total += 2 * scales.hard_scale * p.z_loss * absolute;  // as it is of every r
    }
  f.hard = (f.label + f.smooth_total) / sums.hard;
  if (!(epsilon > 0)) return loss;
  return loss + smooth * (scales.weight_sum * (lse + max) - sums.smooth);
}

template <typename Real>
KD_INLINE double hard_loss(const KdLoss& p, const KdScales& scales, const Sums<Real>& sums,
                           int64_t label, double at_label, Factors& f) {
  const double w = p.weight ? p.weight[label] : 1.0, max = reference_of(sums.student_max);
  return cross_entropy(p, scales, sums, max, w, at_label, f);
}

// The label's entry of the gradient, of its weight and exponentials; r_y - 1 cancels in float32.
template <typename D>
KD_INLINE D label_gradient(const FactorsOf<D>& f, D w, D student, D teacher, D hard) {
  const D gradient = f.hard * hard - f.label + f.smooth * w;
  return f.teacher == 0.0 ? gradient : gradient + (f.student * student - f.teacher * teacher);
}

// The class the student is sure of, and the sums of all other classes' exponentials. Its entry of
// the gradient is a difference of two numbers near 1 and would keep few digits.
struct Sure {
  int64_t index;  // -1: no such class
  double student, teacher, hard;
};

// Whether the cross entropy alone makes the row sure: at very high temperatures every e^(s/T) is 1.
template <typename Real>
KD_INLINE bool sure_by_hard(const Sums<Real>& sums, bool hard) {
  return hard && sums.hard < 1.5;
}
template <typename Real>
KD_INLINE bool is_sure(const Sums<Real>& sums, bool hard) {
  return sums.student < 1.5 || sure_by_hard(sums, hard);
}

// Its entry of the gradient, 1 - q, 1 - p and 1 - r being had from the other classes; `w` is its
// weight.
template <typename D, typename S, typename Mask>
KD_INLINE D sure_gradient(const FactorsOf<D>& f, const S& others, bool hard, D w, Mask on_label) {
  const D soft = rounded(f.teacher * others.teacher) - rounded(f.student * others.student);
  D gradient = f.teacher == 0.0 ? D{} : soft;
  if (!hard) return gradient;
  // r - 1 is had as -(1 - r), on the label; off it, the 1 is put back.
  gradient += f.smooth_total - f.hard * others.hard + f.smooth * w;
  return on_label ? gradient : gradient + f.label;
}

KD_INLINE double sure_gradient(const KdLoss& p, const Factors& f, const Sure& sure, bool hard,
                               int64_t label) {
  const double w = p.weight ? p.weight[sure.index] : 1.0;
  return sure_gradient(f, sure, hard, w, label == sure.index);
}

// ---- is float32 enough? ------------------------------------------------------------------------

// A float32 exponential is off by up to `epsilon` of itself. The loss multiplies that by T^2, and
// the gradient is a difference of exponentials that may be small: a row that this puts at risk is
// visited again in double.
constexpr double kEpsilon = 0x1p-24;
constexpr double kLossBound = 2e-6;  // what the package promises, of 1 + loss

// Of the gradient's norm: half of what the package promises, as products are rounded, too.
KD_INLINE double gradient_bound(KdDtype dtype) { return dtype == kFloat32 ? 1e-6 : 0x1p-13; }

// At most the sum of the squared probabilities, of which the largest is 1 / sum.
template <typename D>
KD_INLINE D squared(D sum) {
  return 1.0 / sum;
}
// The same for some of them, whose exponentials add up to `others`.
template <typename D>
KD_INLINE D squared(D others, D sum) {
  return (others < 1.0 ? others * others : others) / (sum * sum);
}

// The errors of the exponentials do not average out over the classes, as equal logits have equal
// ones. The largest is exactly 1, but is rounded when another is added: both sums are off by up to
// epsilon of themselves, and so are their logarithms. At T <= 4 and 2^-24 no loss is at risk.
template <typename D>
KD_INLINE auto loss_at_risk(const KdLoss& p, D loss, double epsilon) {
  return 2 * epsilon * p.soft_factor > kLossBound * (1.0 + loss);
}

template <typename Real>
KD_INLINE bool loss_is_exact(const KdLoss& p, const Sums<Real>& sums, double loss, double epsilon) {
  if (sizeof(Real) == 8) return true;
  if (loss == INFINITY && !sums.masked) return false;  // logits near the largest number
  return !loss_at_risk(p, loss, epsilon);              // NaN is as exact as it gets
}

// The squared error of the soft term's gradient, in roundings of its entries. `sured`: one of them
// was had from the sums over `others`.
template <typename S, typename D, typename O, typename Mask>
KD_INLINE D soft_error(const S& sums, const FactorsOf<D>& f, Mask sured, const O& others) {
  const D scale = f.student * sums.student;
  const D shares =
      sured ? squared(others.student, sums.student) + squared(others.teacher, sums.teacher)
            : squared(sums.student) + squared(sums.teacher);
  return scale == 0.0 ? D{} : scale * scale * shares;
}

// `error`: of the soft term; `squares`: of the gradient.
template <typename S, typename D, typename O, typename Mask>
KD_INLINE auto gradient_at_risk(const KdLoss& p, const S& sums, const FactorsOf<D>& f, bool hard,
                                Mask sured, const O& others, D error, D squares, double epsilon) {
  if (hard) {
    const D scale = f.hard * sums.hard;
    const D share = sured ? squared(others.hard, sums.hard) : squared(sums.hard);
    error += scale == 0.0 ? D{} : scale * scale * share;
  }
  const double bound = gradient_bound(p.student_dtype);
  return error * (epsilon * epsilon) > squares * (bound * bound);
}

template <typename Real>
KD_INLINE bool gradient_is_exact(const KdLoss& p, const Sums<Real>& sums, const Factors& f,
                                 bool hard, const Sure& sure, double squares, double epsilon) {
  if (sizeof(Real) == 8) return true;
  if (!hard && squares == 0 && sums.cross == 0) return true;  // teacher = student
  const bool sured = sure.index >= 0;
  const double error = soft_error(sums, f, sured, sure);
  return !gradient_at_risk(p, sums, f, hard, sured, sure, error, squares, epsilon);
}

// ---- the batch ----------------------------------------------------------------------------------

// float16 has five bits of exponent: a gradient of 1/(N*C) would be lost in its subnormals before
// a gradient scaler could lift it. The largest possible entry is brought to about 2^14 instead.
KD_INLINE double float16_scale(double soft_scale, double hard_scale, double max_weight) {
  const double bound = soft_scale + 2 * hard_scale * (max_weight > 1 ? max_weight : 1);
  if (!(bound > 0) || bound == INFINITY) return 1;
  return ldexp(1.0, static_cast<int>(floor(log2(16384 / bound))));
}

KD_INLINE double blend(double alpha, double soft, double hard) {
  // A term of weight zero is no part of the loss: 0 * inf must not make it NaN.
  if (alpha == 0) return hard;
  if (alpha == 1) return soft;
  return alpha * soft + (1 - alpha) * hard;
}

KD_INLINE void put(void* target, bool in_float64, int64_t i, double value) {
  if (!target) return;
  if (in_float64)
    static_cast<double*>(target)[i] = value;
  else
    static_cast<float*>(target)[i] = static_cast<float>(value);
}
