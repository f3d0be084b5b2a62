// The classes of a row, swept by the threads of a block: thread t takes class t and every
// so-manieth after that. All is in double, and a thread writes the classes that it reads: what is
// looked up of another's waits for `sync`.
#pragma once
#include <math.h>

#include "elements.cuh"
#include "teams.cuh"

namespace {

#include "../row_math.inl"

template <int N>
struct Numbers {
  double of[N];
};

struct Softmax {
  double max, inverse_t, sum, log_sum;  // sum: of e^((x - max) / T)

  KD_DEVICE double log(double x) const { return (x - max) * inverse_t - log_sum; }
  // Of all that it is a share of.
  KD_DEVICE double log_total() const { return max * inverse_t + log_sum; }
  // Of which the largest entry is had from the others, as its own would cancel.
  KD_DEVICE bool is_sure() const { return sum < 2; }
};

// A row, and the largest number of it.
struct Logits : Row {
  double max;
};

class Classes {
 public:
  KD_DEVICE Classes(int64_t count, Block& block) : count_(count), block_(block) {}

  KD_DEVICE int64_t count() const { return count_; }
  KD_DEVICE bool leads() const { return block_.rank() == 0; }
  KD_DEVICE void sync() const { block_sync(); }

  // A row of `of(i)`. No thread may still look at what is overwritten, and all may look at what has
  // been written.
  template <typename F>
  KD_DEVICE Logits write(double* to, F of) const {
    sync();
    const double largest = max([&](int64_t i) { return to[i] = of(i); });
    return {{to, kFloat64}, largest};
  }

  template <typename F>
  KD_DEVICE void each(F visit) const {
    each_of(count_, visit);
  }
  template <typename F>
  KD_DEVICE void each_of(int64_t n, F visit) const {
#pragma unroll 1
    for (int64_t i = block_.rank(); i < n; i += block_.size()) visit(i);
  }

  // `add(i, sums)` adds what a class comes to. (By kSlot 0.)
  template <int N, typename F>
  KD_DEVICE Numbers<N> sums_of(int64_t n, F add) const {
    double sums[N] = {};
    each_of(n, [&](int64_t i) { add(i, sums); });
    return block_.template conclude<0, Numbers<N>>(sums, [](const double (&t)[N]) {
      Numbers<N> all;
      for (int k = 0; k < N; ++k) all.of[k] = t[k];
      return all;
    });
  }
  template <int N, typename F>
  KD_DEVICE Numbers<N> sums(F add) const {
    return sums_of<N>(count_, add);
  }
  template <typename F>
  KD_DEVICE double sum(F of) const {
    return sums<1>([&](int64_t i, double (&s)[1]) { s[0] += of(i); }).of[0];
  }

  // NaN if one of them is.
  template <typename F>
  KD_DEVICE double max_of(int64_t n, F of) const {
    double max[1] = {-INFINITY};
    each_of(n, [&](int64_t i) { max[0] = max_nan(max[0], of(i)); });
    block_.max(max);
    return max[0];
  }
  template <typename F>
  KD_DEVICE double max(F of) const {
    return max_of(count_, of);
  }

  // Of the classes that `keep` is true of, of which `max` is the largest. It stays in the block's
  // memory, as registers are few, until the same kSlot is asked for again.
  template <int kSlot, typename F>
  KD_DEVICE const Softmax& softmax(const Row& row, double temperature, double max, F keep) const {
    const double top = reference_of(max), inverse_t = 1 / temperature;
    double sums[1] = {0};
    each([&](int64_t i) { sums[0] += keep(i) ? exp((row[i] - top) * inverse_t) : 0.0; });
    return block_.template conclude<kSlot, Softmax>(
        sums, [&](const double (&t)[1]) { return Softmax{top, inverse_t, t[0], ::log(t[0])}; });
  }
  template <int kSlot, typename F>
  KD_DEVICE const Softmax& softmax_of_some(const Row& row, double temperature, F keep) const {
    const double largest = max([&](int64_t i) { return keep(i) ? row[i] : -INFINITY; });
    return softmax<kSlot>(row, temperature, largest, keep);
  }
  template <int kSlot>
  KD_DEVICE const Softmax& softmax(const Logits& row, double temperature) const {
    return softmax<kSlot>(row, temperature, row.max, [](int64_t) { return true; });
  }

  // log of the sum of e^of(i).
  template <typename F>
  KD_DEVICE double log_of_sum(F of) const {
    const double largest = max(of), top = reference_of(largest);
    return top == INFINITY ? top : top + ::log(sum([&](int64_t i) { return exp(of(i) - top); }));
  }

  // The first class with the largest number; -1 if that is none.
  KD_DEVICE int64_t first_largest(const Logits& row) const {
    const double largest = row.max;
    if (!(fabs(largest) < INFINITY)) return -1;
    return -static_cast<int64_t>(
        max([&](int64_t i) { return row[i] == largest ? -static_cast<double>(i) : -INFINITY; }));
  }

 private:
  int64_t count_;
  Block& block_;
};

}  // namespace
