// Vectors of the width this unit is compiled for, the exponential, and the conversions.
// GCC's and clang's vector extensions: the same source gives SSE2, AVX2, AVX-512 and NEON code.
// Included inside an anonymous namespace: nothing here may be shared with another unit.

template <typename Real>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = KD_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef double Wide __attribute__((vector_size(2 * KD_VECTOR_BYTES)));
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
  typedef V Wide;
  static constexpr double kMinExponent = -1023.0;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 6755399441055744.0 + 1023.0;
};

template <typename Real>
using Vec = typename Lanes<Real>::V;
template <typename Real>
using WideVec = typename Lanes<Real>::Wide;

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

// The last, partial vector of a row: missing lanes read as `fill`, and are not written. Rows of 10
// classes are nothing but this, so the sets that have masked accesses use them.
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
#endif

// A NaN in `a` comes through, as it does not compare.
template <typename V>
KD_INLINE V at_least(V a, V floor) {
  return a < floor ? floor : a;
}

KD_INLINE Lanes<float>::Wide widen(Lanes<float>::V v) {
  return __builtin_convertvector(v, Lanes<float>::Wide);
}
KD_INLINE Lanes<double>::V widen(Lanes<double>::V v) { return v; }

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

template <typename W>
KD_INLINE double total(W v) {
  return fold<sizeof(W)>((const double*)&v, [](auto a, auto b) { return a + b; });
}
template <typename Real>
KD_INLINE Real highest(Vec<Real> v) {
  return fold<sizeof v>((const Real*)&v, [](auto a, auto b) { return a > b ? a : b; });
}
template <typename Real>
KD_INLINE Real lowest(Vec<Real> v) {
  return fold<sizeof v>((const Real*)&v, [](auto a, auto b) { return a < b ? a : b; });
}

// 2^f for |f| <= 1/2, exactly 1 at 0: minimax in relative error, 3e-9 (float) and 2e-17 (double).
KD_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = splat<float>(0.00015594677f);
  p = p * f + 0.00134066438f;
  p = p * f + 0.00961769297f;
  p = p * f + 0.05550310551f;
  p = p * f + 0.24022652783f;
  p = p * f + 0.69314721497f;
  return p * f + 1.0f;
}

KD_INLINE Vec<double> exp2_fraction(Vec<double> f) {
  Vec<double> p = splat<double>(4.0780717860928704165e-10);
  p = p * f + 7.0725703945407994337e-9;
  p = p * f + 1.0180647660573069343e-7;
  p = p * f + 1.3215442675455852182e-6;
  p = p * f + 0.00001525272738518977478;
  p = p * f + 0.00015403530441571850099;
  p = p * f + 0.001333355815343996974;
  p = p * f + 0.0096181291076070026171;
  p = p * f + 0.055504108664790394528;
  p = p * f + 0.24022650695910098006;
  p = p * f + 0.69314718055994569675;
  return p * f + 1.0;
}

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

// 2^(d * scale) for d <= 0; 0 below the smallest normal number, NaN for NaN.
template <typename V, typename Real>
KD_INLINE V exp2_scaled(V d, const Exponent<Real>& scale) {
  typedef Lanes<Real> L;
  d = at_least(d, scale.least);
  V biased = d * scale.high + L::kRound;
  V f = (d * scale.high - (biased - L::kRound)) + d * scale.low;
  typename L::Bits exponent = (typename L::Bits)biased << L::kMantissaBits;
  return exp2_fraction(f) * (V)exponent;
}

// ---- element types -----------------------------------------------------------------------------

KD_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
KD_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

struct BFloat16 {
  uint16_t u;
  KD_INLINE float value() const { return bits_to_float((uint32_t)u << 16); }
  KD_INLINE static BFloat16 of(float x) {
    uint32_t b = float_to_bits(x);
    uint32_t nearest_even = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return BFloat16{(uint16_t)(x != x ? 0x7fc0u : nearest_even)};
  }
};

struct Float16 {
  uint16_t u;
  KD_INLINE float value() const {
    // Shifted into place the exponent is 112 too small; the product mends it, subnormals included.
    uint32_t sign = (uint32_t)(u & 0x8000u) << 16;
    float magnitude = bits_to_float((uint32_t)(u & 0x7fffu) << 13) * 0x1p112f;
    uint32_t b = float_to_bits(magnitude);
    b = (u & 0x7c00u) == 0x7c00u ? 0x7f800000u | ((uint32_t)(u & 0x3ffu) << 13) : b;
    return bits_to_float(sign | b);
  }
  KD_INLINE static Float16 of(float x) {
    uint32_t b = float_to_bits(x);
    uint32_t sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
    // Normal: rebias, round to nearest even. Carries run on into the exponent, up to infinity.
    uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal: adding 1/2 lines the last bit of the result up with float's, rounding included.
    uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return Float16{(uint16_t)(sign | h)};
  }
};

KD_INLINE double value_of(float x) { return x; }
KD_INLINE double value_of(double x) { return x; }
KD_INLINE float value_of(BFloat16 x) { return x.value(); }
KD_INLINE float value_of(Float16 x) { return x.value(); }

template <typename T>
struct ElementOf {
  KD_INLINE static T of(double x) { return (T)x; }
};
template <>
struct ElementOf<BFloat16> {
  KD_INLINE static BFloat16 of(double x) { return BFloat16::of((float)x); }
};
template <>
struct ElementOf<Float16> {
  KD_INLINE static Float16 of(double x) { return Float16::of((float)x); }
};

template <typename T, typename Real>
void convert_in(const void* source, int64_t n, Real* out) {
  const T* p = (const T*)source;
  for (int64_t i = 0; i < n; ++i) out[i] = (Real)value_of(p[i]);
}
template <typename T, typename Real>
void convert_out(const Real* in, int64_t n, void* target) {
  T* p = (T*)target;
  for (int64_t i = 0; i < n; ++i) p[i] = ElementOf<T>::of(in[i]);
}
