// What single numbers say of a row: its largest class, its entropy, a class against all others.
// Included inside an anonymous namespace, after sweeps.inl.

template <typename Real>
struct Description {
  int64_t largest;  // the first of them
  double max;       // of all but the hole
  double sum;       // of e^((v - max) / T)
  double moment;    // of e^((v - max) / T) (v - max) / T

  // -sum p log p.
  double entropy() const { return log(sum) - moment / sum; }
};

// Of a contiguous row; `hole`: a class that is left out, or -1.
template <typename Real>
Description<Real> describe(const Real* row, int64_t n, double temperature, int64_t hole) {
  typedef Vec<Real> V;
  constexpr int L = Lanes<Real>::kCount;
  Description<Real> d = {0, -INFINITY, 0, 0};
  Real max = -INFINITY;
  bool is_nan = false;
  for (int64_t i = 0; i < n; ++i) {
    is_nan |= row[i] != row[i];
    if (i != hole && row[i] > max) max = row[i], d.largest = i;
  }
  d.max = is_nan ? NAN : max;
  const Exponent<Real> exponent(kLog2E / temperature);
  const V top = splat(reference_of(max)), lowest = splat(lowest_number(Real()));
  WideSum<Real> sum, moment;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t left = n - i < L ? n - i : L;
    const Real none = -INFINITY;
    V x = left == L ? load(row + i) : load_part(row + i, left, none);
    if (hole >= i && hole < i + left) x[hole - i] = none;
    const V distance = at_least(x - top, lowest), e = exp2_scaled<Real>(distance, exponent);
    sum.add(e);
    moment.add(e == V{} ? V{} : e * distance);
  }
  d.sum = sum.total();
  d.moment = moment.total() / temperature;
  return d;
}

// -log of the probability of a class, of its log-odds: no digit is lost where that is nearly 1.
template <typename Real>
double cross_entropy_at(const Real* row, int64_t n, int64_t label) {
  const Description<Real> others = describe(row, n, 1, label);
  if (others.sum == 0) return others.max != others.max ? NAN : 0;
  return softplus(log(others.sum) + reference_of(others.max) - (double)row[label]);
}
