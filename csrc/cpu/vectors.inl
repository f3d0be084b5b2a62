// Vectors of the width this unit is compiled for, and the exponential.
// GCC's and clang's vector extensions: the same source gives SSE2, AVX2, AVX-512 and NEON code.
// Included inside an anonymous namespace: nothing here may be shared with another unit.

template <typename Real>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = KD_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(KD_VECTOR_BYTES)));
  static constexpr float kMinExponent = -127.0f;
  static constexpr int kMantissaBits = 23;
  // 1.5 * 2^23 rounds to an integer when added; + 127 leaves it biased, ready to be an exponent.
  static constexpr float kRound = 12582912.0f + 127.0f;
};

template <>
struct Lanes<double> {
  static constexpr int kCount = KD_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(KD_VECTOR_BYTES)));
  static constexpr double kMinExponent = -1023.0;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 6755399441055744.0 + 1023.0;
};

template <typename Real>
using Vec = typename Lanes<Real>::V;

template <typename A, typename B>
struct IsSame {
  static constexpr bool value = false;
};
template <typename A>
struct IsSame<A, A> {
  static constexpr bool value = true;
};

template <typename Real>
KD_INLINE Vec<Real> splat(Real x) {
  return x - Vec<Real>{};
}

template <typename Real>
KD_INLINE Vec<Real> load(const Real* p) {
  Vec<Real> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename Real>
KD_INLINE void store(Real* p, Vec<Real> v) {
  memcpy(p, &v, sizeof v);
}

// Stores that go past the caches, without reading first what they overwrite. Whole vectors at
// aligned addresses; other threads see them after finish_streams.
#if defined(__AVX512F__)
KD_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
KD_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
template <typename Half>
KD_INLINE void stream(void* p, Half v) {
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
}
#elif defined(__AVX2__)
KD_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
KD_INLINE void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
template <typename Half>
KD_INLINE void stream(void* p, Half v) {
  _mm_stream_si128((__m128i*)p, (__m128i)v);
}
#else
template <typename V>
KD_INLINE void stream(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
#endif
#if defined(__AVX2__)
KD_INLINE void finish_streams() { _mm_sfence(); }
KD_INLINE bool can_stream(const void* row) { return (uintptr_t)row % KD_VECTOR_BYTES == 0; }
#else
KD_INLINE void finish_streams() {}
KD_INLINE bool can_stream(const void*) { return false; }
#endif

// The last, partial vector of a row: missing lanes read as `fill`, and are not written or, of what
// is kept, 0.
#if defined(__AVX512F__)
KD_INLINE Vec<float> load_part(const float* p, int64_t n, float fill) {
  return (Vec<float>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), p);
}
KD_INLINE Vec<double> load_part(const double* p, int64_t n, double fill) {
  return (Vec<double>)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), (__mmask8)((1u << n) - 1), p);
}
KD_INLINE void store_part(float* p, int64_t n, Vec<float> v) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
KD_INLINE void store_part(double* p, int64_t n, Vec<double> v) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}
KD_INLINE Vec<float> keep_part(Vec<float> v, int64_t n) {
  return (Vec<float>)_mm512_maskz_mov_ps((__mmask16)((1u << n) - 1), (__m512)v);
}
KD_INLINE Vec<double> keep_part(Vec<double> v, int64_t n) {
  return (Vec<double>)_mm512_maskz_mov_pd((__mmask8)((1u << n) - 1), (__m512d)v);
}
#elif defined(__AVX2__)
KD_INLINE Lanes<float>::Bits first_lanes(int64_t n, float) {
  return Lanes<float>::Bits{0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)n;
}
KD_INLINE Lanes<double>::Bits first_lanes(int64_t n, double) {
  return Lanes<double>::Bits{0, 1, 2, 3} < n;
}
KD_INLINE Vec<float> load_part(const float* p, int64_t n, float fill) {
  const Lanes<float>::Bits mask = first_lanes(n, fill);
  return mask ? (Vec<float>)_mm256_maskload_ps(p, (__m256i)mask) : splat<float>(fill);
}
KD_INLINE Vec<double> load_part(const double* p, int64_t n, double fill) {
  const Lanes<double>::Bits mask = first_lanes(n, fill);
  return mask ? (Vec<double>)_mm256_maskload_pd(p, (__m256i)mask) : splat<double>(fill);
}
KD_INLINE void store_part(float* p, int64_t n, Vec<float> v) {
  _mm256_maskstore_ps(p, (__m256i)first_lanes(n, 0.0f), (__m256)v);
}
KD_INLINE void store_part(double* p, int64_t n, Vec<double> v) {
  _mm256_maskstore_pd(p, (__m256i)first_lanes(n, 0.0), (__m256d)v);
}
template <typename V>
KD_INLINE V keep_part(V v, int64_t n) {
  return first_lanes(n, v[0]) ? v : V{};
}
#else
template <typename Real>
KD_INLINE Vec<Real> load_part(const Real* p, int64_t n, Real fill) {
  Real lanes[Lanes<Real>::kCount];
  for (int i = 0; i < Lanes<Real>::kCount; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}
template <typename Real>
KD_INLINE void store_part(Real* p, int64_t n, Vec<Real> v) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
template <typename V>
KD_INLINE V keep_part(V v, int64_t n) {
  for (int i = 0; i < (int)(sizeof v / sizeof v[0]); ++i) v[i] = i < n ? v[i] : 0;
  return v;
}
#endif

// A NaN in `a` comes through, one in `bound` does not: the instructions return their second operand
// if either is NaN. Of the expressions GCC would make a comparison and a blend.
#if defined(__AVX512F__)
KD_INLINE Vec<float> at_least(Vec<float> a, Vec<float> bound) {
  return (Vec<float>)_mm512_max_ps((__m512)bound, (__m512)a);
}
KD_INLINE Vec<float> at_most(Vec<float> a, Vec<float> bound) {
  return (Vec<float>)_mm512_min_ps((__m512)bound, (__m512)a);
}
#elif defined(__AVX2__)
KD_INLINE Vec<float> at_least(Vec<float> a, Vec<float> bound) {
  return (Vec<float>)_mm256_max_ps((__m256)bound, (__m256)a);
}
KD_INLINE Vec<float> at_most(Vec<float> a, Vec<float> bound) {
  return (Vec<float>)_mm256_min_ps((__m256)bound, (__m256)a);
}
#else
KD_INLINE Vec<float> at_least(Vec<float> a, Vec<float> bound) { return a < bound ? bound : a; }
KD_INLINE Vec<float> at_most(Vec<float> a, Vec<float> bound) { return a > bound ? bound : a; }
#endif
KD_INLINE Vec<double> at_least(Vec<double> a, Vec<double> bound) { return a < bound ? bound : a; }
KD_INLINE Vec<double> at_most(Vec<double> a, Vec<double> bound) { return a > bound ? bound : a; }

KD_INLINE Vec<float> absolute(Vec<float> v) {
  return (Vec<float>)((Lanes<float>::Bits)v & 0x7fffffff);
}
KD_INLINE Vec<double> absolute(Vec<double> v) {
  return (Vec<double>)((Lanes<double>::Bits)v & 0x7fffffffffffffff);
}

// 1 / v of normal numbers; a division takes as long as a dozen other instructions.
KD_INLINE Vec<float> reciprocal(Vec<float> v) {
#if defined(__AVX512F__)
  const Vec<float> near = (Vec<float>)_mm512_rcp14_ps((__m512)v);
  return near + near * (1.0f - v * near);
#else
  return 1.0f / v;
#endif
}
KD_INLINE Vec<double> reciprocal(Vec<double> v) { return 1.0 / v; }

// Each half of a vector in double.
#if defined(__AVX512F__)
KD_INLINE Vec<double> low_half(Vec<float> v) {
  return (Vec<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
}
KD_INLINE Vec<double> high_half(Vec<float> v) {
  return (Vec<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
}
#elif defined(__AVX2__)
KD_INLINE Vec<double> low_half(Vec<float> v) {
  return (Vec<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
}
KD_INLINE Vec<double> high_half(Vec<float> v) {
  return (Vec<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
}
#else
KD_INLINE Vec<double> low_half(Vec<float> v) {
  Vec<double> half;
  for (int i = 0; i < Lanes<double>::kCount; ++i) half[i] = v[i];
  return half;
}
KD_INLINE Vec<double> high_half(Vec<float> v) {
  Vec<double> half;
  for (int i = 0; i < Lanes<double>::kCount; ++i) half[i] = v[Lanes<double>::kCount + i];
  return half;
}
#endif

// Sums in double of vectors of Real, lane by lane.
template <typename Real>
struct WideSum {
  Vec<double> low = {}, high = {};
  KD_INLINE void add(Vec<float> v) {
    low += low_half(v);
    high += high_half(v);
  }
  KD_INLINE double total() const;
};
template <>
struct WideSum<double> {
  Vec<double> sum = {};
  KD_INLINE void add(Vec<double> v) { sum += v; }
  KD_INLINE double total() const;
};

// All lanes combined by halving: log2(lanes) operations deep, where a loop would be lanes deep.
template <int kBytes, typename Real, typename Combine>
KD_INLINE Real fold(const Real* lanes, Combine combine) {
  if constexpr (kBytes == sizeof(Real)) {
    return lanes[0];
  } else {
    typedef Real Half __attribute__((vector_size(kBytes / 2)));
    Half low, high;
    memcpy(&low, lanes, sizeof low);
    memcpy(&high, lanes + kBytes / 2 / sizeof(Real), sizeof high);
    low = combine(low, high);
    return fold<kBytes / 2>((const Real*)&low, combine);
  }
}

// Whether a comparison holds in any lane.
template <typename Mask>
KD_INLINE bool any(Mask mask) {
  typedef int64_t Words __attribute__((vector_size(sizeof mask)));
  const Words words = (Words)mask;
  return fold<sizeof words>((const int64_t*)&words, [](auto a, auto b) { return a | b; }) != 0;
}

KD_INLINE double total(Vec<double> v) {
  return fold<sizeof v>((const double*)&v, [](auto a, auto b) { return a + b; });
}
template <typename Real>
KD_INLINE double WideSum<Real>::total() const {
  return ::total(low + high);
}
KD_INLINE double WideSum<double>::total() const { return ::total(sum); }

template <typename Real>
KD_INLINE Real highest(Vec<Real> v) {
  return fold<sizeof v>((const Real*)&v, [](auto a, auto b) { return a > b ? a : b; });
}
template <typename Real>
KD_INLINE Real lowest(Vec<Real> v) {
  return fold<sizeof v>((const Real*)&v, [](auto a, auto b) { return a < b ? a : b; });
}

// 2^f for |f| <= 1/2, exactly 1 at 0: minimax in relative error, 3e-9 (float) and 2e-17 (double).
template <typename Real>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float kFirst = 0.00015594677f;
  static constexpr float kOthers[] = {0.00134066438f, 0.00961769297f, 0.05550310551f,
                                      0.24022652783f, 0.69314721497f, 1.0f};
};
template <>
struct Exp2<double> {
  static constexpr double kFirst = 4.0780717860928704165e-10;
  static constexpr double kOthers[] = {7.0725703945407994337e-9,
                                       1.0180647660573069343e-7,
                                       1.3215442675455852182e-6,
                                       0.00001525272738518977478,
                                       0.00015403530441571850099,
                                       0.001333355815343996974,
                                       0.0096181291076070026171,
                                       0.055504108664790394528,
                                       0.24022650695910098006,
                                       0.69314718055994569675,
                                       1.0};
};

// A scale for exponents, in two parts: d may be -100 and more, and its product with a rounded scale
// would be off by 100 roundings. With FMA the second part makes it exact at the cost of one more.
template <typename Real>
struct Exponent {
  Vec<Real> high, low, least;  // least: the smallest d whose exponential is not 0
  explicit KD_INLINE Exponent(double scale)
      : high(splat<Real>((Real)scale)),
        low(splat<Real>((Real)(scale - (double)(Real)scale))),
        least(splat<Real>((Real)((double)Lanes<Real>::kMinExponent / scale))) {}
};

// 2^(d * scale) for d <= 0; 0 below the smallest normal number, NaN for NaN. In place of d, and
// step by step for all of them: each step of one waits for the step before, and the processor looks
// hardly further ahead than one of them is long. The second half may have a scale of its own.
template <typename Real, int N>
KD_INLINE void exp2_scaled(Vec<Real> (&d)[N], const Exponent<Real>& scale,
                           const Exponent<Real>& second) {
  typedef Lanes<Real> L;
  Vec<Real> biased[N], f[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Exponent<Real>& own = 2 * i < N ? scale : second;
    d[i] = at_least(d[i], own.least);
    biased[i] = d[i] * own.high + L::kRound;
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Exponent<Real>& own = 2 * i < N ? scale : second;
    f[i] = (d[i] * own.high - (biased[i] - L::kRound)) + d[i] * own.low;
    p[i] = splat<Real>(Exp2<Real>::kFirst);
  }
#pragma GCC unroll 16
  for (const Real coefficient : Exp2<Real>::kOthers)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + coefficient;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    d[i] = p[i] * (Vec<Real>)((typename L::Bits)biased[i] << L::kMantissaBits);
}
template <typename Real, int N>
KD_INLINE void exp2_scaled(Vec<Real> (&d)[N], const Exponent<Real>& scale) {
  exp2_scaled<Real>(d, scale, scale);
}
template <typename Real>
KD_INLINE Vec<Real> exp2_scaled(Vec<Real> d, const Exponent<Real>& scale) {
  Vec<Real> one[] = {d};
  exp2_scaled<Real>(one, scale);
  return one[0];
}

// Of normal numbers > 0, to 1e-13 of itself: x = m 2^e with m next to 1, and log m = 2 artanh u
// with u = (m - 1) / (m + 1), |u| < 0.172, by its series.
KD_INLINE Vec<double> natural_log(Vec<double> x) {
  typedef uint64_t Bits __attribute__((vector_size(KD_VECTOR_BYTES)));
  constexpr uint64_t kBias = uint64_t{1023} << 52;
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;
  const Bits shifted = (Bits)x - kRootHalf + kBias, exponent = shifted >> 52;
  const Vec<double> m = (Vec<double>)((Bits)x - ((exponent << 52) - kBias));
  // An integer below 2^52 as a double: as the low bits of 2^52.
  const Vec<double> e = (Vec<double>)(exponent | uint64_t{0x433} << 52) - (0x1p52 + 1023);
  const Vec<double> u = (m - 1.0) / (m + 1.0), v = u * u;
  Vec<double> series = v * (1.0 / 15) + 1.0 / 13;
  series = series * v + 1.0 / 11;
  series = series * v + 1.0 / 9;
  series = series * v + 1.0 / 7;
  series = series * v + 1.0 / 5;
  series = series * v + 1.0 / 3;
  return e * 0.69314718055994530942 + 2.0 * (u + u * v * series);
}

// The same in float32, of numbers from 2^-100 to 1, to 1e-7 of itself: by a polynomial in m - 1. In
// place, and step by step for all of them.
template <int N>
KD_INLINE void natural_log(Vec<float> (&x)[N]) {
  typedef uint32_t Bits __attribute__((vector_size(KD_VECTOR_BYTES)));
  constexpr uint32_t kBias = uint32_t{127} << 23, kRootHalf = 0x3f3504f3;
  constexpr float kCoefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                                     1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                     -2.4999993993e-1f, 3.3333331174e-1f};
  Vec<float> t[N], e[N], p[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const Bits shifted = (Bits)x[i] - kRootHalf + kBias, exponent = shifted >> 23;
    t[i] = (Vec<float>)((Bits)x[i] - ((exponent << 23) - kBias)) - 1.0f;
    e[i] = (Vec<float>)(exponent | uint32_t{0x4b} << 24) - (0x1p23f + 127.0f);
    p[i] = splat<float>(7.0376836292e-2f);
  }
#pragma GCC unroll 16
  for (const float coefficient : kCoefficients)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) p[i] = p[i] * t[i] + coefficient;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const Vec<float> z = t[i] * t[i];
    const Vec<float> small = p[i] * t[i] * z + e[i] * -2.12194440e-4f - z * 0.5f;
    x[i] = e[i] * 0.693359375f + (t[i] + small);
  }
}
template <int N>
KD_INLINE void natural_log(Vec<double> (&x)[N]) {
  for (int i = 0; i < N; ++i) x[i] = natural_log(x[i]);
}

// e^(x log 2) of any x that is a number: 0 and infinity where they must be.
template <typename Real>
KD_INLINE Vec<Real> exp2_any(Vec<Real> x) {
  typedef Lanes<Real> L;
  constexpr Real kInfinite = (Real)(sizeof(Real) == 4 ? 128 : 1024);
  x = at_most(at_least(x, splat<Real>(L::kMinExponent)), splat(kInfinite));
  const Vec<Real> biased = x + L::kRound, f = x - (biased - L::kRound);
  Vec<Real> p = splat<Real>(Exp2<Real>::kFirst);
#pragma GCC unroll 16
  for (const Real coefficient : Exp2<Real>::kOthers) p = p * f + coefficient;
  return p * (Vec<Real>)((typename L::Bits)biased << L::kMantissaBits);
}
