// What single numbers say of a row: its largest class, its entropy, a class against all others.
// Included inside an anonymous namespace, after sweeps.inl.

template <typename Real>
struct Description {
  double max;     // of all but the hole
  double sum;     // of e^((v - max) / T)
  double moment;  // of e^((v - max) / T) (v - max) / T

  // -sum p log p.
  double entropy() const { return log(sum) - moment / sum; }
};

// The first class with this logit.
template <typename Real>
int64_t first_at(const Real* row, int64_t n, Real value) {
  int64_t found = n;
  for (int64_t first = 0; first < n && found == n; first += kBlock) {
    const int64_t size = n - first < kBlock ? n - first : kBlock;
    bool here = false;
    for (int64_t i = first; i < first + size; ++i) here |= row[i] == value;
    for (int64_t i = first; here && i < first + size; ++i)
      if (row[i] == value) {
        found = i;
        break;
      }
  }
  return found == n ? 0 : found;
}

// Of a contiguous row; `hole`: a class that is left out, or -1.
template <typename Real>
Description<Real> describe(const Real* row, int64_t n, double temperature, int64_t hole) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  const int64_t before = hole < 0 ? n : hole, after = hole < 0 ? n : hole + 1;
  const Real first = highest_of(row, before), second = highest_of(row + after, n - after);
  const Real max = first > second ? first : second;
  const Exponent<Real> exponent(kLog2E / temperature);
  const V top = splat(reference_of(max)), lowest = splat(lowest_number(Real()));
  WideSum<Real> sum, moment;
  auto sweep = [&](const Real* from, int64_t size) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + 4 * L <= size; i += 4 * L) {
      V e[4], product[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        e[k] = product[k] = at_least(load(from + i + k * L) - top, lowest);
      exp2_scaled<Real>(e, exponent);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) product[k] *= e[k];
      sum.add(e[0] + e[1]);
      sum.add(e[2] + e[3]);
      moment.add((product[0] + product[1]) + (product[2] + product[3]));
    }
    each<Real>(size - i, [&](int64_t k, auto part) __attribute__((always_inline)) {
      const V distance = at_least(part.get(from + i + k, (Real)-INFINITY) - top, lowest);
      const V e = exp2_scaled<Real>(distance, exponent);
      sum.add(e);
      moment.add(e * distance);
    });
  };
  sweep(row, before);
  sweep(row + after, n - after);
  Description<Real> d = {(double)max, sum.total(), moment.total() / temperature};
  if (d.sum != d.sum) d.max = NAN;
  return d;
}

// -log of the probability of a class, of its log-odds: no digit is lost where that is nearly 1.
template <typename Real>
double cross_entropy_at(const Real* row, int64_t n, int64_t label) {
  const Description<Real> others = describe(row, n, 1, label);
  if (others.sum == 0) return others.max != others.max ? NAN : 0;
  return softplus(log(others.sum) + reference_of(others.max) - (double)row[label]);
}
