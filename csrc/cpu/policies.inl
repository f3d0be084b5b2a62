// What each divergence is, of a vector of classes: a policy. CONTRIBUTING says what else another
// one needs. Included inside an anonymous namespace, before divergences.inl.

// A vector of classes. `distance` is log(q / p) but for a constant of the row, `ratio` with it;
// `exponent` is log q but for a constant; `spread` 1 and twice the constant.
template <typename V>
struct Classes {
  V p, q, distance, ratio, exponent, spread;
};

// Terms of `value`, of v, and of what the row's constant is to be multiplied with and added to the
// value (rounded to float32 in every term it would be off by the same in all). A constant in df/dq
// drops out of the gradient and is left out. `off`: by how many roundings v may be off.
template <typename V>
struct Terms {
  V value, v, constant, off;
};

// The error of `ratio`, in roundings.
template <typename V>
KD_INLINE V ratio_off(const Classes<V>& c) {
  return absolute(c.distance) + absolute(c.exponent) + c.spread;
}

// log(p / m) and log(q / m) of the mixture m = w p + (1 - w) q, by way of its ratio to the larger
// of the two, so that nothing overflows.
template <typename V>
struct Mixture {
  V largest, smallest, y;  // m = largest * y
  V p_value, p_constant;   // log(p / m) but for the constant, and its sign
  V q_value, q_constant;   // log(q / m)
  V q_ratio;               // log(q / m) with the constant
};

// Of several vectors step by step: each waits for its own last step.
template <typename V, int N>
KD_INLINE void mixture(const Classes<V> (&c)[N], double w, Mixture<V> (&m)[N]) {
  typedef decltype(c[0].p[0] + 0) Real;
  const V tiny = splat<Real>((Real)0x1p-100), one = splat<Real>(1), none = {};
  const V of_p = splat((Real)w), of_q = splat((Real)(1 - w));
  V log_y[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const auto p_larger = c[i].p >= c[i].q;
    m[i].largest = p_larger ? c[i].p : c[i].q;
    m[i].smallest = p_larger ? c[i].q : c[i].p;
    const V ratio = m[i].smallest * reciprocal(at_least(m[i].largest, tiny));
    m[i].y = log_y[i] = (p_larger ? of_p : of_q) + (p_larger ? of_q : of_p) * ratio;
  }
  natural_log(log_y);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const auto p_larger = c[i].p >= c[i].q;
    m[i].p_value = (p_larger ? none : -c[i].distance) - log_y[i];
    m[i].p_constant = p_larger ? none : -one;
    m[i].q_value = (p_larger ? c[i].distance : none) - log_y[i];
    m[i].q_constant = p_larger ? one : none;
    m[i].q_ratio = (p_larger ? c[i].ratio : none) - log_y[i];
  }
}

// A policy that treats each vector by itself.
template <typename Policy>
struct OneByOne {
  template <typename V, int N>
  KD_INLINE void at(const Classes<V> (&c)[N], Terms<V> (&t)[N]) const {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) t[i] = static_cast<const Policy*>(this)->of(c[i]);
  }
};

// A policy that needs the mixture w p + (1 - w) q.
template <typename Policy>
struct OfMixture {
  template <typename V, int N>
  KD_INLINE void at(const Classes<V> (&c)[N], Terms<V> (&t)[N]) const {
    const Policy& policy = *static_cast<const Policy*>(this);
    Mixture<V> m[N];
    mixture(c, policy.share(), m);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) t[i] = policy.of(c[i], m[i]);
  }
};

struct ForwardKL : OneByOne<ForwardKL> {
  static constexpr bool kConstant = true;
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c) const {
    return {-c.p * c.distance, -c.p, -c.p, c.p + c.p};
  }
};

struct ReverseKL : OneByOne<ReverseKL> {
  static constexpr bool kConstant = true;
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c) const {
    const V term = c.q * c.distance;
    return {term, term, c.q, c.q * ratio_off(c)};
  }
};

// b KL(p | m) + (1 - b) KL(q | m), m = b p + (1 - b) q.
struct JensenShannon : OfMixture<JensenShannon> {
  static constexpr bool kConstant = true;
  double b;
  explicit JensenShannon(double beta) : b(beta) {}
  double share() const { return b; }
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c, const Mixture<V>& m) const {
    typedef decltype(c.p[0] + 0) Real;
    const V p = (Real)b * c.p, q = (Real)(1 - b) * c.q;
    return {p * m.p_value + q * m.q_value, q * m.q_ratio, p * m.p_constant + q * m.q_constant,
            q * ratio_off(c)};
  }
};

// KL(p | l p + (1 - l) q).
struct SkewForwardKL : OfMixture<SkewForwardKL> {
  static constexpr bool kConstant = true;
  double l;
  explicit SkewForwardKL(double skew) : l(skew) {}
  double share() const { return l; }
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c, const Mixture<V>& m) const {
    typedef decltype(c.p[0] + 0) Real;
    const V v = (Real)(l - 1) * m.smallest * reciprocal(m.y);  // p q / m
    return {c.p * m.p_value, v, c.p * m.p_constant, -4 * v};
  }
};

// KL(q | l q + (1 - l) p).
struct SkewReverseKL : OfMixture<SkewReverseKL> {
  static constexpr bool kConstant = true;
  double l;
  explicit SkewReverseKL(double skew) : l(skew) {}
  double share() const { return 1 - l; }
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c, const Mixture<V>& m) const {
    typedef decltype(c.p[0] + 0) Real;
    const V share = (Real)l * c.q * reciprocal(at_least(m.largest, splat((Real)0x1p-100)) * m.y);
    return {c.q * m.q_value, c.q * (m.q_ratio - share), c.q * m.q_constant,
            c.q * (ratio_off(c) + 4)};
  }
};

// Its v jumps where p = q: next to that the sign of their difference is anybody's guess.
struct TotalVariation : OneByOne<TotalVariation> {
  static constexpr bool kConstant = false;
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c) const {
    const V half = c.q / 2, none = {};
    const V v = c.q > c.p ? half : c.q < c.p ? -half : none;
    const auto sure = absolute(c.ratio) > ratio_off(c) * (4 * (float)kEpsilon);
    return {absolute(c.p - c.q) / 2, v, none, sure ? c.q : c.q * 0x1p60f};
  }
};

// p^a q^(1 - a). `norm`: of both distributions, for what exponent and distance leave out.
template <typename V>
KD_INLINE V geometric(const Classes<V>& c, double a, double norm, double shift, V& exponent) {
  typedef decltype(c.p[0] + 0) Real;
  exponent = c.exponent - c.distance * (Real)a - (Real)shift;
  return exp2_any<Real>(exponent * (Real)kLog2E) * (Real)norm;
}

// Its error, in roundings.
template <typename V>
KD_INLINE V geometric_off(const Classes<V>& c, V exponent, double a) {
  typedef decltype(c.p[0] + 0) Real;
  return absolute(exponent) + absolute(c.exponent) +
         absolute(c.distance) * (Real)(a < 0 ? -2 * a : 2 * a) + (Real)4;
}

// (sum p^a q^(1 - a) - 1) / (a (a - 1)), with the 1 taken off class by class.
struct AlphaDivergence : OneByOne<AlphaDivergence> {
  static constexpr bool kConstant = false;
  double a, norm;
  AlphaDivergence(double a, double norm) : a(a), norm(norm) {}
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c) const {
    typedef decltype(c.p[0] + 0) Real;
    V exponent;
    const V w = geometric(c, a, norm, 0, exponent);
    const V value = (w - c.p * (Real)a - c.q * (Real)(1 - a)) * (Real)(1 / (a * (a - 1)));
    const V v = w * (Real)(-1 / a);
    return {value, v, V{}, absolute(v) * geometric_off(c, exponent, a)};
  }
};

// The sum under Renyi's logarithm, and then, times 1 / sum, its v.
struct Renyi : OneByOne<Renyi> {
  static constexpr bool kConstant = false;
  double a, norm, shift, inverse_sum;
  Renyi(double a, double norm, double shift, double inverse_sum)
      : a(a), norm(norm), shift(shift), inverse_sum(inverse_sum) {}
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c) const {
    typedef decltype(c.p[0] + 0) Real;
    V exponent;
    const V w = geometric(c, a, norm, shift, exponent), v = w * (Real)-inverse_sum;
    return {w, v, V{}, absolute(v) * geometric_off(c, exponent, a)};
  }
};

// The chance that both draw the same class; its logarithm is the term. In double by its logarithm:
// distributions may be so far apart that the products of their probabilities are too small.
struct Agreement : OneByOne<Agreement> {
  static constexpr bool kConstant = false;
  double norm, shift, inverse_sum;
  Agreement(double norm, double shift, double inverse_sum)
      : norm(norm), shift(shift), inverse_sum(inverse_sum) {}
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c) const {
    typedef decltype(c.p[0] + 0) Real;
    V w = c.p * c.q;
    if constexpr (sizeof(Real) == 8) {
      const V both = c.exponent + c.exponent - c.distance;
      w = exp2_any<Real>((both - shift) * kLog2E) * norm;
    }
    const V v = w * (Real)-inverse_sum;
    return {w, v, V{}, -8 * v};
  }
};

// The squared difference of the entropies; `off`: the roundings of that difference.
struct EntropyGap : OneByOne<EntropyGap> {
  static constexpr bool kConstant = false;
  double gap, off;
  EntropyGap(double gap, double off) : gap(gap), off(off) {}
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c) const {
    typedef decltype(c.p[0] + 0) Real;
    const V twice = 2 * c.q * c.exponent;
    const V v = twice * (Real)gap;
    return {V{}, v, V{}, absolute(twice) * (Real)off + absolute(v) * (absolute(c.exponent) + 4)};
  }
};

// 1 - the correlation of p and q, as half the squared distance of their directions a and b. Times
// |q| its derivative is b - a - (1 - correlation) b, which next to the teacher is all but 0; far
// from it, correlation b - a is the sum that does not cancel.
struct Correlation : OneByOne<Correlation> {
  static constexpr bool kConstant = false;
  double mean, p_norm, q_norm, distance;  // 1 / classes, 1 / lengths, the value
  Correlation(double mean, double p_norm, double q_norm, double distance)
      : mean(mean), p_norm(p_norm), q_norm(q_norm), distance(distance) {}
  template <typename V>
  KD_INLINE Terms<V> of(const Classes<V>& c) const {
    typedef decltype(c.p[0] + 0) Real;
    const double correlation = 1 - distance, size = correlation < 0 ? -correlation : correlation;
    const bool near = distance < 0.5;
    const V a = (c.p - (Real)mean) * (Real)p_norm, b = (c.q - (Real)mean) * (Real)q_norm;
    const V apart = b - a, scale = c.q * (Real)q_norm;
    const V v = near ? apart - b * (Real)distance : b * (Real)correlation - a;
    const V of_a = c.p * (Real)p_norm + absolute(a), of_b = scale + absolute(b);
    // At most the sum of |a b|, of which the correlation is off by a few roundings.
    const double products = size + 4 * p_norm * q_norm * mean;
    const V rounding = of_a + of_b * (Real)(near ? 1 : products);
    return {apart * apart * (Real)0.5, scale * v, V{}, 4 * scale * rounding};
  }
};
