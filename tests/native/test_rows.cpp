// The native kernels without Python: every dtype pair, ragged sizes, strides and option, on heap
// buffers of exactly the right size, so that AddressSanitizer sees the first byte too far. Values
// are compared with the textbook formula in double. Run by sanitize.sh, once per instruction set.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "columns.h"
#include "cpu/run.h"
#include "cpu/sets.h"
#include "plans.h"

namespace {

const double kInf = std::numeric_limits<double>::infinity();
const double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kIgnore = -100;

struct Case {
  int64_t rows, classes, padding;  // padding: unused elements after each row
  KdDtype student, teacher;
  double temperature, alpha, smoothing;
  bool weights, inplace, grad, narrow_labels, distill_ignored, masked, no_labels;
  KdReduction reduction;
};

int64_t width(KdDtype d) { return d == kFloat64 ? 8 : d == kFloat32 ? 4 : 2; }

// Truncating conversions suffice to make inputs: what counts is the value that is stored.
void put(std::vector<char>& m, KdDtype d, int64_t i, double v) {
  char* p = m.data() + i * width(d);
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint16_t h = static_cast<uint16_t>(bits >> 16);
  if (d == kFloat16) {
    const int exponent = static_cast<int>((bits >> 23) & 0xff) - 127;
    h = static_cast<uint16_t>((bits >> 16) & 0x8000);
    if (exponent >= 16)
      h |= std::isnan(f) ? 0x7e00 : 0x7c00;
    else if (exponent >= -14)
      h |= static_cast<uint16_t>(((exponent + 15) << 10) | ((bits >> 13) & 0x3ff));
  }
  if (d == kFloat64)
    std::memcpy(p, &v, 8);
  else if (d == kFloat32)
    std::memcpy(p, &f, 4);
  else
    std::memcpy(p, &h, 2);
}

double get(const std::vector<char>& m, KdDtype d, int64_t i) {
  const char* p = m.data() + i * width(d);
  double v;
  float f;
  uint16_t h;
  if (d == kFloat64) {
    std::memcpy(&v, p, 8);
    return v;
  }
  if (d == kFloat32) {
    std::memcpy(&f, p, 4);
    return f;
  }
  std::memcpy(&h, p, 2);
  if (d == kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  const int exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  const double sign = h & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? kNan : sign * kInf;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

std::vector<double> softmax(const std::vector<double>& v, double t) {
  double max = -kInf, sum = 0;
  for (double x : v) max = std::fmax(max, x);
  std::vector<double> p;
  for (double x : v) p.push_back(std::exp((x - max) / t)), sum += p.back();
  for (double& x : p) x /= sum;
  return p;
}

bool check(const Case& c, std::mt19937& random) {
  std::normal_distribution<double> normal;
  const int64_t stride = c.classes + c.padding, length = (c.rows - 1) * stride + c.classes;
  std::vector<char> s(length * width(c.student)), t(length * width(c.teacher));
  std::vector<int64_t> labels;
  std::vector<int32_t> narrow;
  std::vector<double> w(c.classes, 1.0);
  if (c.weights)
    for (double& x : w) x = 0.5 + std::fabs(normal(random));
  std::vector<std::vector<double>> sv(c.rows), tv(c.rows);
  for (int64_t i = 0; i < c.rows; ++i) {
    labels.push_back(i == 1 ? kIgnore : static_cast<int64_t>(random() % c.classes));
    narrow.push_back(static_cast<int32_t>(labels.back()));
    for (int64_t k = 0; k < c.classes; ++k) {
      const bool hole = c.masked && c.classes > 4 && k % 3 == 1 && k != labels[i];
      const bool junk = i == 1 && !c.distill_ignored && !c.no_labels;
      put(s, c.student, i * stride + k, junk ? kNan : hole ? -kInf : 3 * normal(random));
      put(t, c.teacher, i * stride + k, junk ? kNan : hole ? -kInf : 3 * normal(random));
      sv[i].push_back(get(s, c.student, i * stride + k));
      tv[i].push_back(get(t, c.teacher, i * stride + k));
    }
  }
  const double alpha = c.no_labels ? 1 : c.alpha;
  std::vector<char> grad(c.grad && !c.inplace ? c.rows * c.classes * width(c.student) : 0);
  std::vector<double> loss(c.reduction == kNone ? c.rows : 1), soft(loss), hard(loss);
  KdProblem p = {};
  p.student = s.data();
  p.teacher = t.data();
  p.grad = !c.grad ? nullptr : c.inplace ? s.data() : grad.data();
  p.labels = c.no_labels       ? nullptr
             : c.narrow_labels ? static_cast<const void*>(narrow.data())
                               : labels.data();
  p.weight = c.weights ? w.data() : nullptr;
  p.student_dtype = c.student;
  p.teacher_dtype = c.teacher;
  p.student_rows = p.teacher_rows = {1, stride, 0};
  p.grad_rows = {1, c.inplace ? stride : c.classes, 0};
  p.labels_are_int64 = !c.narrow_labels;
  p.distill_ignored = c.distill_ignored;
  p.want_soft = true;
  p.want_hard = !c.no_labels;
  p.rows = c.rows;
  p.classes = c.classes;
  p.ignore_index = kIgnore;
  p.temperature = p.teacher_temperature = c.temperature;
  p.soft_factor = c.temperature * c.temperature;
  p.alpha = alpha;
  p.label_smoothing = c.smoothing;
  const KdStatus status =
      kd_run(p, {c.reduction, true, loss.data(), soft.data(), hard.data(), nullptr}, 2);

  double soft_rows = 0, hard_rows = 0, total_w = 0, error = 0, norm = 0;
  for (double x : w) total_w += x;
  std::vector<char> soft_on(c.rows), hard_on(c.rows);
  for (int64_t i = 0; i < c.rows; ++i) {
    hard_on[i] = !c.no_labels && labels[i] != kIgnore;
    soft_on[i] = c.no_labels || c.distill_ignored || hard_on[i];
    soft_rows += soft_on[i];
    if (hard_on[i]) hard_rows += w[labels[i]];
  }
  if (c.reduction != kMean || !soft_rows) soft_rows = 1;
  if (c.reduction != kMean || !hard_rows) hard_rows = 1;
  std::vector<double> expected(loss.size());
  for (int64_t i = 0; i < c.rows; ++i) {
    const double T = c.temperature, e = c.smoothing;
    const std::vector<double> q = softmax(sv[i], T), pt = softmax(tv[i], T), r = softmax(sv[i], 1);
    double kl = 0, ce = 0;
    for (int64_t k = 0; k < c.classes; ++k) {
      if (soft_on[i] && pt[k] > 0) kl += pt[k] * std::log(pt[k] / q[k]);
      const double y = k == labels[i] ? (1 - e) * w[k] : 0;
      if (hard_on[i] && y + e > 0) ce -= (y + e / c.classes * w[k]) * std::log(r[k]);
      double g = soft_on[i] ? alpha * T / soft_rows * (q[k] - pt[k]) : 0;
      if (hard_on[i])
        g += (1 - alpha) / hard_rows *
             (((1 - e) * w[labels[i]] + e / c.classes * total_w) * r[k] - y - e / c.classes * w[k]);
      if (!c.grad) continue;
      const double got =
          get(c.inplace ? s : grad, c.student, i * (c.inplace ? stride : c.classes) + k);
      error += std::pow(got / status.grad_scale - g, 2);
      norm += g * g;
    }
    expected[c.reduction == kNone ? i : 0] +=
        alpha * T * T * kl / soft_rows + (1 - alpha) * ce / hard_rows;
  }
  bool good = std::sqrt(error) <= std::sqrt(norm) * (width(c.student) == 2 ? 8e-3 : 2e-6) + 1e-12;
  for (size_t i = 0; i < loss.size(); ++i) {
    const bool both_inf = std::isinf(expected[i]) && expected[i] == loss[i];
    good &= both_inf || std::fabs(loss[i] - expected[i]) <= 2e-6 * (1 + std::fabs(expected[i]));
  }
  if (!good)
    std::printf(
        "FAILED rows %ld classes %ld dtypes %d %d T %g alpha %g smoothing %g inplace %d "
        "masked %d: loss %.9g expected %.9g, gradient error %.3g of %.3g\n",
        (long)c.rows, (long)c.classes, c.student, c.teacher, c.temperature, alpha, c.smoothing,
        c.inplace, c.masked, loss[0], expected[0], std::sqrt(error), std::sqrt(norm));
  return good;
}

}  // namespace

// The other divergences, in exactly the memory that they may touch: their gradients sum to 0.
bool check_divergence(KdDivergence kind, int64_t classes, KdDtype dtype, bool grad,
                      std::mt19937& random) {
  const int64_t rows = 3, n = rows * classes;
  std::vector<uint16_t> s16(n), t16(n), g16(n);
  std::vector<float> s32(n), t32(n), g32(n), loss(rows);
  std::vector<int64_t> labels(rows);
  for (int64_t i = 0; i < n; ++i) {
    s16[i] = static_cast<uint16_t>((random() & 0x80ff) | 0x3f00);  // +-0.5 to 3.98
    t16[i] = static_cast<uint16_t>((random() & 0x80ff) | 0x3f00);
    s32[i] = static_cast<float>(random() % 1000) / 100;
    t32[i] = static_cast<float>(random() % 1000) / 100;
  }
  for (int64_t& label : labels) label = random() % classes;
  const bool half = dtype == kBFloat16;
  KdProblem p = {};
  p.student = half ? static_cast<const void*>(s16.data()) : s32.data();
  p.teacher = half ? static_cast<const void*>(t16.data()) : t32.data();
  p.grad = !grad ? nullptr : half ? static_cast<void*>(g16.data()) : g32.data();
  p.labels = labels.data();
  p.student_dtype = p.teacher_dtype = dtype;
  p.student_rows = p.teacher_rows = p.grad_rows = {1, classes, 0};
  p.labels_are_int64 = p.want_soft = p.want_hard = true;
  p.rows = rows;
  p.classes = classes;
  p.ignore_index = kIgnore;
  p.temperature = p.teacher_temperature = 2;
  p.soft_factor = 4;
  p.alpha = 0.7;
  p.general = true;
  p.decoupled = kind == kDecoupled;
  p.terms = 1;
  p.term[0] = {kind, 1.0, 0.3, 0.6, nullptr, nullptr};
  kd_run(p, {kNone, false, loss.data(), nullptr, nullptr, nullptr}, 2);
  bool good = true;
  for (int64_t i = 0; i < rows; ++i) {
    double total = 0, size = 1e-30;
    for (int64_t k = 0; grad && !half && k < classes; ++k) {
      total += g32[i * classes + k];
      size += std::fabs(g32[i * classes + k]);
    }
    good &= std::isfinite(loss[i]) && loss[i] >= 0 && std::fabs(total) <= 1e-5 * size;
  }
  if (!good) std::printf("FAILED divergence %d classes %ld dtype %d\n", kind, (long)classes, dtype);
  return good;
}

int main() {
  std::mt19937 random(0);
  int failed = 0, done = 0;
  // Around every vector width and the block size; 70,000 elements wake the second thread.
  for (int64_t classes :
       {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 1000, 2047, 2048, 2049, 4133, 35000})
    for (int student = 0; student < 4; ++student)
      for (int teacher = 0; teacher < 4; ++teacher)
        for (double t : {0.7, 1.0, 2.0, 3.0, 4.0, 20.0}) {
          const bool heavy = classes > 3000 && (student != teacher || t == 3.0);
          for (int variant = 0; variant < (heavy ? 1 : 4); ++variant) {
            Case c = {};
            c.rows = variant == 3 ? 1 : 4;
            c.classes = classes;
            c.padding = variant == 1 ? 3 : 0;
            c.student = static_cast<KdDtype>(student);
            c.teacher = static_cast<KdDtype>(teacher);
            c.temperature = t;
            c.alpha = std::vector<double>{0.9, 0.0, 1.0, 0.3}[variant];
            c.smoothing = variant == 1 ? 0.1 : 0;
            c.masked = variant == 2;
            c.weights = variant == 1;
            c.inplace = random() % 2;
            c.grad = random() % 4 > 0;
            c.narrow_labels = random() % 2;
            c.distill_ignored = random() % 2;
            c.no_labels = variant == 2;
            c.reduction = static_cast<KdReduction>(random() % 3);
            failed += !check(c, random);
            ++done;
          }
        }
  for (int64_t classes : {2, 7, 16, 31, 129, 2048, 2049, 4133})
    for (int kind = kForwardKL; kind <= kDecoupled; ++kind)
      for (const KdDtype dtype : {kFloat32, kBFloat16})
        for (const bool grad : {false, true}) {
          failed +=
              !check_divergence(static_cast<KdDivergence>(kind), classes, dtype, grad, random);
          ++done;
        }
  for (int64_t classes : {1, 2, 5, 16, 17, 31, 129, 2048, 2049, 4133})
    for (int kind = 0; kind < kPlanKinds; ++kind)
      for (const KdDtype dtype : {kFloat32, kFloat64})
        for (const bool grad : {false, true}) {
          const bool inplace = random() % 2;
          failed += !check_plan(static_cast<PlanKind>(kind), classes, dtype, grad, inplace, random);
          ++done;
        }
  for (int64_t rows : {1, 2, 3, 40})
    for (int64_t classes : {1, 2, 7, 16, 17, 511, 513, 2049, 4133})
      for (const KdDtype teacher : {kFloat32, kFloat16, kBFloat16, kFloat64}) {
        failed += !check_columns(rows, classes, teacher, random);
        ++done;
      }
  // Labels out of range are reported before anything is written.
  float logits[2] = {1, 2}, grad[2] = {7, 7}, loss = 7;
  for (int64_t bad : {int64_t{2}, int64_t{-1}, std::numeric_limits<int64_t>::max()}) {
    KdProblem p = {};
    p.student = p.teacher = logits;
    p.grad = grad;
    p.labels = &bad;
    p.labels_are_int64 = p.want_hard = p.want_soft = true;
    p.student_rows = p.teacher_rows = p.grad_rows = {1, 2, 0};
    p.rows = 1;
    p.classes = 2;
    p.ignore_index = kIgnore;
    p.temperature = p.teacher_temperature = p.soft_factor = 1;
    p.alpha = 0.5;
    const KdStatus status = kd_run(p, {kMean, false, &loss, nullptr, nullptr, nullptr}, 1);
    failed += !(status.bad_label_row == 0 && loss == 7 && grad[0] == 7 && grad[1] == 7);
    ++done;
  }
  std::printf("%s: %d native cases, %d failed\n", kd_set().name, done, failed);
  return failed != 0;
}
