// One row on the GPU: the algorithm of csrc/cpu/rows.inl for a team of threads. The row is brought
// into shared memory once and swept there: maxima, sums, gradient, the exponentials being made anew
// in each sweep, as storing them would take twice the memory. Rows that float32 is not enough for
// are swept again in double. A row that shared memory cannot hold is swept in chunks and read
// again.
//
// A thread sweeps what it has copied itself, so that no barrier stands between copy and sweep.
#pragma once
#include <math.h>

#include <type_traits>

#include "exponentials.cuh"
#include "problem.cuh"
#include "teams.cuh"

namespace {

#include "../row_math.inl"

// How a sweep computes: Real is the type, kWidth the classes at a time.
template <typename S, bool kFast>
struct InFloat {
  typedef float Real;
  typedef FloatExponent<kFast> Exponent;
  static constexpr int kWidth = 16 / sizeof(S);
  static constexpr double kError = kFast ? 0x1p-22 : kEpsilon;  // of an exponential
};
struct InDouble {
  typedef double Real;
  typedef DoubleExponent Exponent;
  static constexpr int kWidth = 1;  // rare: registers are worth more
  static constexpr double kError = 0;
};

// -inf counts as the lowest number once the maximum is subtracted: times 0 it is 0 and not NaN.
KD_DEVICE float lowest_number(float) { return -0x1.fffffep127f; }
KD_DEVICE double lowest_number(double) { return -0x1.fffffffffffffp1023; }

// S: the student's type. Teachers of another type are converted to float on their way in.
template <typename S, bool kSameType, bool kFast, typename Team>
class RowWork {
  typedef std::conditional_t<kSameType, S, float> T;
  typedef std::conditional_t<sizeof(S) == 8, double, float> Native;
  static constexpr int kVector = 16 / sizeof(S);  // classes of the student in 16 bytes

 public:
  // Bytes of shared memory per vector of a chunk.
  static constexpr int kVectorBytes = 16 + kVector * static_cast<int>(sizeof(T));

  struct Terms {
    double soft, hard;
  };

  KD_DEVICE RowWork(const KdCudaProblem& problem, const KdScales& the_scales, Team& the_team,
                    char* memory)
      : p(problem),
        scales(the_scales),
        team(the_team),
        student_memory(reinterpret_cast<S*>(memory)),
        teacher_memory(reinterpret_cast<T*>(memory + 16 * problem.chunk)) {}

  // Finds the row's place and starts to copy it.
  KD_DEVICE void begin(int64_t row) {
    label = p.labels ? p.label(row) : 0;
    hard = p.labels && label != p.ignore_index;
    soft = !p.labels || p.distill_ignored || hard;
    grad = p.grad ? static_cast<S*>(p.grad) + p.grad_rows.start(row) : nullptr;
    student = static_cast<const S*>(p.student) + p.student_rows.start(row);
    const int64_t teacher_start = p.teacher_rows.start(row);
    teacher = kSameType ? static_cast<const char*>(p.teacher) + teacher_start * sizeof(S)
                        : static_cast<const char*>(p.teacher) +
                              teacher_start * (p.teacher_dtype == kFloat32 ? 4 : 2);
    // Vectors are aligned in the student's memory: the first and the last may be incomplete.
    shift = misaligned(student);
    teacher_aligned = kSameType && misaligned(teacher) == shift;
    grad_aligned = misaligned(grad) == shift;
    const int vectors = static_cast<int>((p.classes + shift + kVector - 1) / kVector);
    const int share = (vectors + team.slices() - 1) / team.slices();
    first = min(team.slice() * share, vectors);
    last = min(first + share, vectors);
    chunks = (share + p.chunk - 1) / p.chunk;
    bad_label = hard && (label < 0 || label >= p.classes);
    hard = hard && p.want_hard;
    if (!soft) return;  // not even read: it may hold NaN
    at_label = hard && !bad_label ? static_cast<double>(to_float(student[label])) : 0;
    copy_in(0);
  }

  // The row's terms, for one thread of the team to add up, and its gradient.
  KD_DEVICE Terms finish() {
    Terms terms = {0, 0};
    if (!soft) {
      if (grad) write_zeros();
      return terms;
    }
    copy_async_wait();
    Good good = kNothing;
    if constexpr (sizeof(S) != 8) good = attempt<InFloat<S, kFast>>(terms);
    if (good != kAll) {
      // A gradient done again leaves the loss alone: asking for one does not change the other.
      Terms again = {0, 0};
      attempt<InDouble>(again);
      if (good == kNothing) terms = again;
    }
    return terms;
  }

 private:
  enum Good { kNothing, kLoss, kAll };  // what of a row was good enough

  // What is drawn from the sums: all that the gradient needs.
  template <typename Real>
  struct Conclusion {
    Sums<Real> sums;
    Factors f;
    Terms terms;
    bool exact;
  };

  template <typename How>
  KD_DEVICE Good attempt(Terms& terms) {
    typedef typename How::Real Real;
    const Conclusion<Real>& c = conclude_sums<How>();
    if (!c.exact) return kNothing;
    terms = c.terms;
    if (!grad) return kAll;
    const bool hard_gradient = hard && p.alpha != 1;
    const Sure sure = sure_class<How>(c, hard_gradient);
    const double at_sure = sure.index < 0 ? 0 : sure_gradient(p, c.f, sure, hard_gradient, label);
    // A row read again must not be overwritten before its gradient is known to be good.
    const bool rehearse = sizeof(Real) == 4 && chunks > 1 && p.grad == p.student;
    if (rehearse && !conclude_gradient<How>(c, sure, at_sure, hard_gradient, false)) return kLoss;
    return conclude_gradient<How>(c, sure, at_sure, hard_gradient, true) ? kAll : kLoss;
  }

  // ---- sums -------------------------------------------------------------------------------------

  template <typename How>
  KD_DEVICE decltype(auto) conclude_sums() {
    typedef typename How::Real Real;
    Sums<Real> sums = {-INFINITY, -INFINITY, 0, 0, 0, 0, 0, false};
    const double inverse_t = 1 / p.temperature;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1 && (chunk > 0 || sizeof(Real) == 8)) copy_again(chunk);
      const Maxima<Native> m = maxima(chunk);
      if (chunk > 0) {
        raise_maxima(sums, static_cast<Real>(m.student), static_cast<Real>(m.teacher), inverse_t,
                     inverse_t);
      } else {
        sums.student_max = m.student;
        sums.teacher_max = m.teacher;
      }
      add_sums<How>(chunk, inverse_t, m.has_masked, sums);
    }
    double totals[] = {sums.student, sums.teacher, sums.cross,
                       sums.hard,    sums.smooth,  sums.masked ? 1.0 : 0.0};
    return team.template conclude<0, Conclusion<Real>>(totals, [&](const double (&t)[6]) {
      Conclusion<Real> c = {};
      c.sums = {sums.student_max, sums.teacher_max, t[0], t[1], t[2], t[3], t[4], t[5] > 0};
      c.exact = true;
      if (p.want_soft) {
        c.terms.soft = soft_loss(p, c.sums);
        c.exact = loss_is_exact(p, c.sums, c.terms.soft, How::kError);
      }
      if (p.alpha > 0) soft_factors(scales, c.sums, c.f);
      if (hard) c.terms.hard = hard_loss(p, scales, c.sums, bad_label ? 0 : label, at_label, c.f);
      if (bad_label) c.terms.hard = c.f.hard = NAN;
      return c;
    });
  }

  template <typename M>
  struct Maxima {
    M student, teacher;
    bool has_masked;  // some class of the student is -inf
  };

  KD_DEVICE Maxima<Native> maxima(int chunk) {
    constexpr int kWidth = sizeof(S) == 8 ? 1 : kVector;
    Native m[3] = {-INFINITY, -INFINITY, -INFINITY};  // the last: of -student
    for_each<kWidth>(chunk, [&](int slot, int64_t at) {
      Native s[kWidth], t[kWidth];
      read(student_memory + slot, s);
      read(teacher_memory + slot, t);
      const bool whole = is_whole<kWidth>(at);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        m[0] = max_nan(m[0], s[k]);
        m[1] = max_nan(m[1], t[k]);
        if (whole || is_inside(at + k)) m[2] = max_nan(m[2], -s[k]);
      }
    });
    team.max(m);
    return {m[0], m[1], m[2] == INFINITY};
  }

  // Adds a chunk to this thread's sums. They are in double: of floats, pairs are added before that
  // where the logarithm of the sum is multiplied by T^2, else fours.
  template <typename How>
  KD_DEVICE void add_sums(int chunk, double inverse_t, bool has_masked,
                          Sums<typename How::Real>& sums) {
    typedef typename How::Real Real;
    constexpr int kWidth = How::kWidth;
    const typename How::Exponent soft_exponent(inverse_t), hard_exponent(1);
    const Real student_max = reference_of(sums.student_max);
    const Real teacher_max = reference_of(sums.teacher_max);
    const bool smoothing = hard && p.label_smoothing > 0;
    for_each<kWidth>(chunk, [&](int slot, int64_t at) {
      Real s[kWidth], t[kWidth], es[kWidth];
      read(student_memory + slot, s);
      read(teacher_memory + slot, t);
      Real students = 0, teachers = 0, crosses = 0, hards = 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const Real ds = max_nan(s[k] - student_max, lowest_number(Real()));
        const Real dt = max_nan(t[k] - teacher_max, lowest_number(Real()));
        es[k] = soft_exponent(ds);
        const Real et = soft_exponent(dt);
        students += es[k];
        teachers += et;
        crosses = multiply_add(et, dt - ds, crosses);
        if (k % 2 == 1 || k == kWidth - 1) {
          sums.student += students;
          sums.teacher += teachers;
          students = teachers = 0;
        }
        if (k % 4 == 3 || k == kWidth - 1) {
          sums.cross += crosses;
          crosses = 0;
        }
      }
      if (has_masked)
        for (int k = 0; k < kWidth; ++k) sums.masked |= s[k] == -INFINITY && t[k] > -INFINITY;
      if (!hard) return;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        hards += hard_exponential(s[k] - student_max, es[k], hard_exponent);
        if (k % 4 == 3 || k == kWidth - 1) {
          sums.hard += hards;
          hards = 0;
        }
      }
      if (smoothing)
        for (int k = 0; k < kWidth; ++k)
          if (is_inside(at + k)) sums.smooth += (p.weight ? p.weight[at + k] : 1.0) * s[k];
    });
  }

  // ---- gradient ---------------------------------------------------------------------------------

  template <typename How>
  KD_DEVICE Sure sure_class(const Conclusion<typename How::Real>& c, bool hard_gradient) {
    typedef typename How::Real Real;
    constexpr int kWidth = How::kWidth;
    if (!is_sure(c.sums, hard_gradient)) return {-1, 0, 0, 0};
    const typename How::Exponent soft_exponent(1 / p.temperature), hard_exponent(1);
    double others[4] = {0, 0, 0, 0};  // the last: index of the class left out, and 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) copy_again(chunk);
      for_each<kWidth>(chunk, [&](int slot, int64_t at) {
        Real s[kWidth], t[kWidth];
        read(student_memory + slot, s);
        read(teacher_memory + slot, t);
        for (int k = 0; k < kWidth; ++k) {
          const Real ds = s[k] - c.sums.student_max;
          if (ds == 0) {  // the only one: a second would make the sum 2
            others[3] += static_cast<double>(at + k + 1);
            continue;
          }
          const Real es = soft_exponent(ds);
          others[0] += es;
          others[1] += soft_exponent(t[k] - c.sums.teacher_max);
          if (hard_gradient) others[2] += hard_exponential(ds, es, hard_exponent);
        }
      });
    }
    return team.template conclude<1, Sure>(others, [](const double (&t)[4]) {
      return Sure{static_cast<int64_t>(t[3]) - 1, t[0], t[1], t[2]};
    });
  }

  // Computes the gradient, and writes it if `store`; false if float32 was not enough.
  template <typename How>
  KD_DEVICE bool conclude_gradient(const Conclusion<typename How::Real>& c, const Sure& sure,
                                   double at_sure, bool hard_gradient, bool store) {
    double squares[1] = {0};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) copy_again(chunk);
      squares[0] += gradient<How>(chunk, c, sure.index, at_sure, hard_gradient, store);
    }
    if (sizeof(typename How::Real) == 8) return true;
    return team.template conclude<2, bool>(squares, [&](const double (&t)[1]) {
      return gradient_is_exact(p, c.sums, c.f, hard_gradient, sure, t[0], How::kError);
    });
  }

  template <typename How>
  KD_DEVICE double gradient(int chunk, const Conclusion<typename How::Real>& c, int64_t sure,
                            double at_sure, bool hard_gradient, bool store) {
    typedef typename How::Real Real;
    constexpr int kWidth = How::kWidth;
    const typename How::Exponent soft_exponent(1 / p.temperature), hard_exponent(1);
    const Real student_max = reference_of(c.sums.student_max);
    const Real teacher_max = reference_of(c.sums.teacher_max);
    const Real of_q = c.f.student, of_p = c.f.teacher, of_r = c.f.hard;
    const Real constant = p.weight ? 0 : c.f.smooth, at_label_less = c.f.label;
    const bool soft_gradient = of_q != 0 || of_p != 0;  // else the teacher may hold NaN
    Real squares = 0;
    for_each<kWidth>(chunk, [&](int slot, int64_t at) {
      Real s[kWidth], t[kWidth], g[kWidth];
      read(student_memory + slot, s);
      read(teacher_memory + slot, t);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const Real ds = s[k] - student_max, es = soft_exponent(ds);
        const Real et = soft_exponent(t[k] - teacher_max);
        g[k] = soft_gradient ? of_q * es - of_p * et : 0;
        s[k] = ds, t[k] = es;
      }
      if (hard_gradient) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          g[k] = multiply_add(of_r, hard_exponential(s[k], t[k], hard_exponent), g[k] + constant);
        if (p.weight && c.f.smooth != 0)
          for (int k = 0; k < kWidth; ++k)
            if (is_inside(at + k)) g[k] += static_cast<Real>(c.f.smooth * p.weight[at + k]);
        put_entry(g, label - at, [&](Real& entry) { entry -= at_label_less; });
      }
      if (sure >= 0)
        put_entry(g, sure - at, [&](Real& entry) { entry = static_cast<Real>(at_sure); });
      const bool whole = is_whole<kWidth>(at);
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        if (whole || is_inside(at + k)) squares = multiply_add(g[k], g[k], squares);
      if (store) write(g, at, whole);
    });
    return squares;
  }

  // Changes one entry of a vector, if it is there. No index that is known at run time only: that
  // would move the vector from registers to memory.
  template <typename Real, int kWidth, typename F>
  KD_DEVICE static void put_entry(Real (&g)[kWidth], int64_t index, F change) {
    if (index < 0 || index >= kWidth) return;
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (k == index) change(g[k]);
  }

  KD_DEVICE float hard_exponential(float d, float es, const FloatExponent<kFast>& own) const {
    if (p.power == 0) return own(d);
    const float square = es * es;
    return p.power == 1 ? es : p.power == 2 ? square : p.power == 3 ? square * es : square * square;
  }
  KD_DEVICE double hard_exponential(double d, double, const DoubleExponent& own) const {
    return own(d);
  }

  // ---- memory -----------------------------------------------------------------------------------

  template <typename E>
  KD_DEVICE static int misaligned(const E* address) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(address) / sizeof(S) % kVector);
  }
  KD_DEVICE bool is_inside(int64_t at) const { return at >= 0 && at < p.classes; }
  template <int kWidth>
  KD_DEVICE bool is_whole(int64_t at) const {
    return at >= 0 && at + kWidth <= p.classes;
  }

  // Calls visit(place in this chunk's memory, class) for each kWidth classes that this thread
  // copied; outside of the row they are -inf.
  template <int kWidth, typename F>
  KD_DEVICE void for_each(int chunk, F visit) const {
    const int begin = first + chunk * p.chunk, end = min(begin + p.chunk, last);
#pragma unroll 1  // a vector is enough to hide its latencies; more would take registers
    for (int j = begin + team.rank(); j < end; j += team.size()) {
      const int slot = (j - begin) * kVector;
      const int64_t at = static_cast<int64_t>(j) * kVector - shift;
#pragma unroll 1
      for (int k = 0; k < kVector; k += kWidth) visit(slot + k, at + k);
    }
  }

  KD_DEVICE void copy_in(int chunk) {
    for_each<kVector>(chunk, [&](int slot, int64_t at) {
      S* s = student_memory + slot;
      T* t = teacher_memory + slot;
      const bool whole = is_whole<kVector>(at);
      if (whole) {
        copy_async(s, student + at);
      } else {
        for (int k = 0; k < kVector; ++k)
          if (is_inside(at + k))
            s[k] = student[at + k];
          else
            round_to(s[k], -INFINITY);
      }
      if (whole && teacher_aligned) {
        copy_async(t, teacher + at * sizeof(S));
      } else {
        for (int k = 0; k < kVector; ++k)
          if (is_inside(at + k))
            copy_teacher(at + k, t[k]);
          else
            round_to(t[k], -INFINITY);
      }
    });
  }
  KD_DEVICE void copy_again(int chunk) {
    copy_in(chunk);
    copy_async_wait();
  }
  KD_DEVICE void copy_teacher(int64_t at, T& to) const {
    if (kSameType) {
      to = reinterpret_cast<const T*>(teacher)[at];
    } else if (p.teacher_dtype == kFloat32) {
      round_to(to, reinterpret_cast<const float*>(teacher)[at]);
    } else if (p.teacher_dtype == kBFloat16) {
      round_to(to, to_float(reinterpret_cast<const BFloat16*>(teacher)[at]));
    } else {
      round_to(to, to_float(reinterpret_cast<const Float16*>(teacher)[at]));
    }
  }

  template <typename E, typename Real, int kWidth>
  KD_DEVICE static void read(const E* from, Real (&values)[kWidth]) {
    if constexpr (kWidth == 1)
      values[0] = to_float(*from);
    else
      read_vectors(from, values);
  }

  template <typename Real, int kWidth>
  KD_DEVICE void write(const Real (&g)[kWidth], int64_t at, bool whole) const {
    if constexpr (kWidth == kVector) {
      if (whole && grad_aligned) return write_vector(grad + at, g);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (whole || is_inside(at + k)) round_to(grad[at + k], g[k]);
  }
  KD_DEVICE void write_zeros() const {
    for (int chunk = 0; chunk < chunks; ++chunk)
      for_each<kVector>(chunk, [&](int, int64_t at) {
        const Native zeros[kVector] = {};
        write(zeros, at, is_whole<kVector>(at));
      });
  }

  const KdCudaProblem& p;
  const KdScales& scales;
  Team& team;
  S* student_memory;
  T* teacher_memory;

  // Of the row at hand.
  const S* student;
  const char* teacher;
  S* grad;
  int64_t label;
  double at_label;
  int shift, first, last, chunks;  // first, last: the vectors of this team's, or block's, slice
  bool soft, hard, bad_label, teacher_aligned, grad_aligned;
};

}  // namespace
