// Rows into the lanes of vectors, and back. Included inside an anonymous namespace, after
// elements.inl.

#if !defined(__has_builtin)
#define __has_builtin(x) 0
#endif

// A square of vectors with rows and lanes exchanged: at each stage the off-diagonal quarters of its
// blocks of 2 D change places.
#if __has_builtin(__builtin_shufflevector)
template <int D, int... J>
KD_INLINE void exchange(Vec<float>& a, Vec<float>& b, std::integer_sequence<int, J...>) {
  constexpr int L = sizeof...(J);
  const Vec<float> low = __builtin_shufflevector(a, b, (J & D ? L + J - D : J)...);
  b = __builtin_shufflevector(a, b, (J & D ? L + J : J + D)...);
  a = low;
}
template <int D = Lanes<float>::kCount / 2>
KD_INLINE void transpose(Vec<float>* square) {
  constexpr int L = Lanes<float>::kCount;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & D)) exchange<D>(square[i], square[i | D], std::make_integer_sequence<int, L>());
  if constexpr (D > 1) transpose<D / 2>(square);
}
#else
KD_INLINE void transpose(Vec<float>* square) {
  constexpr int L = Lanes<float>::kCount;
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < i; ++j) {
      const float kept = square[i][j];
      square[i][j] = square[j][i];
      square[j][i] = kept;
    }
}
#endif

// The first n of a vector of elements; the others are 0, or left alone.
template <typename E>
KD_INLINE Vec<float> read_part(const E* from, int64_t n) {
  E elements[Lanes<float>::kCount] = {};
  memcpy(elements, from, n * sizeof *from);
  return Read<float, E>::at(elements);
}
KD_INLINE Vec<float> read_part(const float* from, int64_t n) { return load_part(from, n, 0.0f); }

template <typename E>
KD_INLINE void write_part(Vec<float> v, int64_t n, E* to) {
  const HalfWords half = Rounded<E>::of(v);
  memcpy(to, &half, n * sizeof *to);
}
KD_INLINE void write_part(Vec<float> v, int64_t n, float* to) { store_part(to, n, v); }
template <typename E>
KD_INLINE void write(Vec<float> v, E* to) {
  const HalfWords half = Rounded<E>::of(v);
  memcpy(to, &half, sizeof half);
}
KD_INLINE void write(Vec<float> v, float* to) { store(to, v); }

// rows[r] -> lanes[class][r]. Inlined into its switch alone; 16 vectors at a time stay in
// registers.
template <typename E>
void into_lanes(const char* const* rows, int64_t classes, float* lanes) {
  constexpr int L = Lanes<float>::kCount;
  Vec<float> square[L];
  for (int64_t first = 0; first < classes; first += L) {
    const int64_t n = classes - first;
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      const E* const row = (const E*)rows[r] + first;
      square[r] = n < L ? read_part(row, n) : Read<float, E>::at(row);
    }
    transpose(square);
    float* const to = lanes + first * L;
    if (n >= L) {
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) store(to + k * L, square[k]);
    } else {
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k)
        if (k < n) store(to + k * L, square[k]);
    }
  }
}

// lanes[class][r] -> rows[r], of those that are not null.
template <typename E>
void out_of_lanes(const float* lanes, int64_t classes, char* const* rows) {
  constexpr int L = Lanes<float>::kCount;
  Vec<float> square[L];
  for (int64_t first = 0; first < classes; first += L) {
    const int64_t n = classes - first;
    const float* const from = lanes + first * L;
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) square[k] = k < n ? load(from + k * L) : Vec<float>{};
    transpose(square);
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      if (!rows[r]) continue;
      E* const row = (E*)rows[r] + first;
      n < L ? write_part(square[r], n, row) : write(square[r], row);
    }
  }
}

inline void into_lanes(const char* const* rows, KdDtype dtype, int64_t classes, float* lanes) {
  switch (dtype) {
    case kBFloat16:
      return into_lanes<BFloat16>(rows, classes, lanes);
    case kFloat16:
      return into_lanes<Float16>(rows, classes, lanes);
    default:
      return into_lanes<float>(rows, classes, lanes);
  }
}

inline void out_of_lanes(const float* lanes, int64_t classes, KdDtype dtype, char* const* rows) {
  switch (dtype) {
    case kBFloat16:
      return out_of_lanes<BFloat16>(lanes, classes, rows);
    case kFloat16:
      return out_of_lanes<Float16>(lanes, classes, rows);
    default:
      return out_of_lanes<float>(lanes, classes, rows);
  }
}
