// The types of the logits, and their conversion to the type that is computed in, a vector at a
// time. Included inside an anonymous namespace, after vectors.inl.

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

// ---- vectors of them ----------------------------------------------------------------------------

typedef uint16_t HalfWords __attribute__((vector_size(KD_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(KD_VECTOR_BYTES)));

KD_INLINE Words words_at(const void* p) {
  HalfWords half;
  memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)half);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, Words);
#endif
}

// Elements of type E as a vector of Real.
template <typename Real, typename E>
struct Read {
  KD_INLINE static Vec<Real> at(const E* p) {
    Real lanes[Lanes<Real>::kCount];
    for (int i = 0; i < Lanes<Real>::kCount; ++i) lanes[i] = (Real)value_of(p[i]);
    return load(lanes);
  }
};
template <typename Real>
struct Read<Real, Real> {
  KD_INLINE static Vec<Real> at(const Real* p) { return load(p); }
};
template <>
struct Read<float, BFloat16> {
  KD_INLINE static Vec<float> at(const BFloat16* p) { return (Vec<float>)(words_at(p) << 16); }
};
#if defined(__AVX512F__)
template <>
struct Read<float, Float16> {
  KD_INLINE static Vec<float> at(const Float16* p) {
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
};
#endif

KD_INLINE HalfWords narrow(Words words) {
#if defined(__AVX512F__)
  return (HalfWords)_mm512_cvtepi32_epi16((__m512i)words);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  return (HalfWords)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(words, HalfWords);
#endif
}
template <typename E>
struct Rounded;
template <>
struct Rounded<BFloat16> {
  KD_INLINE static HalfWords of(Vec<float> v) {
    const Words b = (Words)v, nearest_even = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return narrow(v != v ? Words{} + 0x7fc0u : nearest_even);
  }
};
template <>
struct Rounded<Float16> {
  KD_INLINE static HalfWords of(Vec<float> v) {
#if defined(__AVX512F__)
    return (HalfWords)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    uint16_t lanes[Lanes<float>::kCount];
    for (int i = 0; i < Lanes<float>::kCount; ++i) lanes[i] = Float16::of(v[i]).u;
    HalfWords half;
    memcpy(&half, lanes, sizeof half);
    return half;
#endif
  }
};

// n numbers as elements; `past_caches` as in stream(), if `out` allows it.
template <typename E>
void convert_out(const float* in, int64_t n, E* out, bool past_caches) {
  constexpr int L = Lanes<float>::kCount;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const HalfWords half = Rounded<E>::of(load(in + i));
    if (past_caches)
      stream(out + i, half);
    else
      memcpy(out + i, &half, sizeof half);
  }
  for (; i < n; ++i) out[i] = E::of(in[i]);
}
KD_INLINE void convert_out(const float* in, int64_t n, float* out, bool) {
  memcpy(out, in, n * sizeof *in);
}
KD_INLINE void convert_out(const float* in, int64_t n, double* out, bool) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}
template <typename E>
void convert_out(const double* in, int64_t n, E* out, bool) {
  for (int64_t i = 0; i < n; ++i) out[i] = ElementOf<E>::of(in[i]);
}
