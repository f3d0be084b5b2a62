// Loops over a row a vector at a time, its last part included. Included inside an anonymous
// namespace, after sweeps.inl.

// A whole vector of a row, or as much of one as is left.
struct Whole {
  template <typename Real>
  KD_INLINE Vec<Real> get(const Real* p, Real) const {
    return load(p);
  }
  template <typename Real>
  KD_INLINE void put(Real* p, Vec<Real> v) const {
    store(p, v);
  }
  template <typename V>
  KD_INLINE V keep(V v) const {
    return v;
  }
};
struct Part {
  int64_t n;
  template <typename Real>
  KD_INLINE Vec<Real> get(const Real* p, Real fill) const {
    return load_part(p, n, fill);
  }
  template <typename Real>
  KD_INLINE void put(Real* p, Vec<Real> v) const {
    store_part(p, n, v);
  }
  template <typename V>
  KD_INLINE V keep(V v) const {
    return keep_part(v, n);
  }
};

// fn(index, Whole or Part) over n elements.
template <typename Real, typename Fn>
KD_INLINE void each(int64_t n, Fn fn) {
  constexpr int L = Lanes<Real>::kCount;
  int64_t i = 0;
  for (; i + L <= n; i += L) fn(i, Whole());
  if (i < n) fn(i, Part{n - i});
}

// Of a contiguous row.
template <typename Real>
double sum_of_squares(const Real* row, int64_t n) {
  WideSum<Real> sum;
  each<Real>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const Vec<Real> x = part.get(row + i, (Real)0);
    sum.add(x * x);
  });
  return sum.total();
}

template <typename Real>
void add_to(Real* row, const Real* other, int64_t n) {
  each<Real>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    part.put(row + i, part.get(row + i, (Real)0) + part.get(other + i, (Real)0));
  });
}

template <typename Real>
void multiply(Real* row, Real factor, int64_t n) {
  each<Real>(n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    part.put(row + i, part.get(row + i, (Real)0) * factor);
  });
}

// As Real, block by block; returns its largest number.
template <typename Real>
Real copy_of(const char* row, KdDtype dtype, int64_t n, Real* copy) {
  Real largest = -INFINITY;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = n - first < kBlock ? n - first : kBlock;
    const Block<Real> block = survey(row, dtype, first, size, copy + first);
    if (block.values != copy + first) memcpy(copy + first, block.values, size * sizeof(Real));
    if (block.high > largest) largest = block.high;
  }
  return largest;
}

// Four chains of comparisons: one alone would wait for each of its instructions.
template <typename Real>
Real highest_of(const Real* row, int64_t n) {
  Real largest = -INFINITY;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = n - first < kBlock ? n - first : kBlock;
    const Real high = survey(row + first, size, (Real*)nullptr).high;
    if (high > largest) largest = high;
  }
  return largest;
}

template <typename Real>
Real highest_or_nan(const Real* row, int64_t n) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount, kChains = 4;
  const V none = splat((Real)-INFINITY);
  V largest[kChains] = {none, none, none, none};
  decltype(none != none) strange[kChains] = {};
  auto step = [&](V x, int chain) __attribute__((always_inline)) {
    largest[chain] = at_least(largest[chain], x);
    strange[chain] |= x != x;
  };
  int64_t i = 0;
  for (; i + kChains * L <= n; i += kChains * L)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) step(load(row + i + k * L), k);
  each<Real>(n - i, [&](int64_t k, auto part) __attribute__((always_inline)) {
    step(part.get(row + i + k, (Real)-INFINITY), 0);
  });
  for (int k = 1; k < kChains; ++k) {
    step(largest[k], 0);
    strange[0] |= strange[k];
  }
  return any(strange[0]) ? (Real)NAN : highest<Real>(largest[0]);
}
