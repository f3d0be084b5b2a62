// The Python face of csrc/cpu. Knows nothing of torch: `run` takes raw pointers and sizes, checked
// by kdkernels/checks.py and laid out by kdkernels/backends/cpu.py; `run_plain` takes tensors as
// they are, if they need neither.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/columns.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/run.h"
#include "cpu/sets.h"
#include "plan_bindings.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

// What does not change from call to call.
struct Options {
  double temperature, alpha;
  int64_t ignore_index;
  double label_smoothing;
  KdReduction reduction;
  bool distill_ignored;
  double teacher_temperature, soft_factor;
  std::vector<KdTerm> terms;  // none: the forward KL alone, at one temperature

  Options(double temperature, double alpha, int64_t ignore_index, double label_smoothing,
          int reduction, bool distill_ignored, double teacher_temperature, double soft_factor,
          const std::vector<std::tuple<int, double, double, double>>& mixture)
      : temperature(temperature),
        alpha(alpha),
        ignore_index(ignore_index),
        label_smoothing(label_smoothing),
        reduction(static_cast<KdReduction>(reduction)),
        distill_ignored(distill_ignored),
        teacher_temperature(teacher_temperature),
        soft_factor(soft_factor) {
    if (mixture.size() > kMaxTerms) throw std::invalid_argument("too many divergences");
    for (const auto& [kind, weight, parameter, second] : mixture)
      terms.push_back(
          {static_cast<KdDivergence>(kind), weight, parameter, second, nullptr, nullptr});
  }

  KdProblem problem() const {
    KdProblem p = {};
    p.temperature = temperature;
    p.alpha = alpha;
    p.ignore_index = ignore_index;
    p.label_smoothing = label_smoothing;
    p.distill_ignored = distill_ignored;
    p.teacher_temperature = teacher_temperature;
    p.soft_factor = soft_factor;
    p.general = !terms.empty();
    p.decoupled = p.general && terms[0].kind == kDecoupled;
    p.terms = static_cast<int>(terms.size());
    std::copy(terms.begin(), terms.end(), p.term);
    return p;
  }
};

// Holding the GIL costs other threads little below this, releasing it costs this call something.
constexpr int64_t kReleaseWork = 16384;

double run(KdProblem& p, const Options& options, void* loss, void* soft, void* hard,
           const double* num_items, int threads) {
  p.want_soft = p.alpha > 0 || soft;
  p.want_hard = p.labels && (p.alpha < 1 || hard);
  const bool in_float64 = p.student_dtype == kFloat64;
  const KdOutput out = {options.reduction, in_float64, loss, soft, hard, num_items};
  KdStatus status;
  {
    std::optional<py::gil_scoped_release> unlocked;
    if (p.rows * p.classes >= kReleaseWork) unlocked.emplace();
    status = kd_run(p, out, threads);
  }
  if (status.bad_label_row >= 0)
    throw py::index_error("labels[" + std::to_string(status.bad_label_row) + "] is " +
                          std::to_string(p.label(status.bad_label_row)) +
                          ": expected 0 <= label < " + std::to_string(p.classes) +
                          " or ignore_index " + std::to_string(p.ignore_index));
  return status.grad_scale;
}

double run_laid_out(const Options& options, uintptr_t student, uintptr_t teacher, uintptr_t labels,
                    uintptr_t weight, uintptr_t grad, uintptr_t loss, uintptr_t soft,
                    uintptr_t hard, const Rows& student_rows, const Rows& teacher_rows,
                    const Rows& grad_rows, int64_t rows, int64_t classes, int student_dtype,
                    int teacher_dtype, bool labels_are_int64, int threads,
                    const std::vector<std::pair<uintptr_t, uintptr_t>>& of_rows, Plan* plan,
                    double z_loss, uintptr_t num_items) {
  KdProblem p = options.problem();
  p.plan = plan;
  p.z_loss = z_loss;
  if (plan) p.general = true;  // as much memory as any pass asks for
  for (size_t k = 0; k < of_rows.size() && k < options.terms.size(); ++k) {
    p.term[k].row_weight = pointer<const double>(of_rows[k].first);
    p.term[k].row_parameter = pointer<const double>(of_rows[k].second);
  }
  p.student = pointer<const void>(student);
  p.teacher = pointer<const void>(teacher);
  p.grad = pointer<void>(grad);
  p.labels = pointer<const void>(labels);
  p.weight = pointer<const double>(weight);
  p.student_dtype = static_cast<KdDtype>(student_dtype);
  p.teacher_dtype = static_cast<KdDtype>(teacher_dtype);
  p.student_rows = rows_of(student_rows);
  p.teacher_rows = rows_of(teacher_rows);
  p.grad_rows = rows_of(grad_rows);
  p.labels_are_int64 = labels_are_int64;
  p.rows = rows;
  p.classes = classes;
  return run(p, options, pointer<void>(loss), pointer<void>(soft), pointer<void>(hard),
             pointer<const double>(num_items), threads);
}

KdTensors& tensors() {
  static KdTensors* const kept = new KdTensors;  // outlives the interpreter
  return *kept;
}

// Whether logits and labels are as most are: contiguous, in this process's memory, of types that
// the kernel reads, of shapes that fit each other. Then `p` has them.
bool describe(py::handle student, py::handle teacher, py::handle labels, KdProblem& p) {
  DLTensor s, t, y;
  if (!tensors().describe(student, s) || !tensors().describe(teacher, t) ||
      !tensors().describe(labels, y))
    return false;
  const int student_type = float_type(s), teacher_type = float_type(t), rows = s.ndim - 1;
  if (student_type < 0 || teacher_type < 0 || !is_integer(y) || rows < 0) return false;
  if (t.ndim != s.ndim || y.ndim != rows) return false;
  if (!same_shape(t, s, s.ndim) || !same_shape(y, s, rows)) return false;
  p.student = s.data;
  p.teacher = t.data;
  p.labels = y.data;
  p.student_dtype = static_cast<KdDtype>(student_type);
  p.teacher_dtype = static_cast<KdDtype>(teacher_type);
  p.labels_are_int64 = y.dtype.bits == 64;
  p.classes = s.shape[rows];
  p.rows = elements(s) / p.classes;
  p.student_rows = p.teacher_rows = p.grad_rows = {1, p.classes, 0};
  return true;
}

// DLPack does not tell that a tensor is to be read with the other sign.
bool is_negated(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const auto answer =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), name));
  if (!answer) throw py::error_already_set();
  return answer.ptr() != Py_False;
}

bool is_plain(py::handle student, py::handle teacher, py::handle labels) {
  KdProblem p = {};
  return describe(student, teacher, labels, p) && !is_negated(student) && !is_negated(teacher) &&
         !is_negated(labels);
}

// Of tensors of which is_plain is true, into a gradient (or None) and a loss that were made to fit.
double run_plain(const Options& options, py::handle student, py::handle teacher, py::handle labels,
                 py::handle grad, py::handle loss, int threads) {
  KdProblem p = options.problem();
  DLTensor g, l;
  bool fits = describe(student, teacher, labels, p) && tensors().describe(loss, l) &&
              elements(l) == (options.reduction == kNone ? p.rows : 1) &&
              float_type(l) == (p.student_dtype == kFloat64 ? kFloat64 : kFloat32);
  if (fits && !grad.is_none()) {
    fits = tensors().describe(grad, g) && elements(g) == p.rows * p.classes &&
           float_type(g) == p.student_dtype;
    p.grad = g.data;
  }
  if (!fits) throw py::value_error("run_plain needs plain tensors that fit each other");
  return run(p, options, l.data, nullptr, nullptr, nullptr, threads);
}

double compare_columns(uintptr_t student, uintptr_t teacher, uintptr_t active, uintptr_t grad,
                       const Rows& student_rows, const Rows& teacher_rows, int64_t rows,
                       int64_t classes, int student_dtype, int teacher_dtype, bool in_float64,
                       double temperature, double teacher_temperature, double scale, int threads) {
  KdColumns c = {};
  c.student = pointer<const void>(student);
  c.teacher = pointer<const void>(teacher);
  c.active = pointer<const bool>(active);
  c.grad = pointer<void>(grad);
  c.student_rows = rows_of(student_rows);
  c.teacher_rows = rows_of(teacher_rows);
  c.rows = rows;
  c.classes = classes;
  c.student_dtype = static_cast<KdDtype>(student_dtype);
  c.teacher_dtype = static_cast<KdDtype>(teacher_dtype);
  c.in_float64 = in_float64;
  c.temperature = temperature;
  c.teacher_temperature = teacher_temperature;
  c.scale = scale;
  const py::gil_scoped_release unlocked;
  return kd_compare_columns(c, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Compiled CPU kernels of kdkernels; use kdkernels.kd_loss.";
  kd_openmp_library();  // found now, so that a fork is noticed whoever used the threads before
  py::class_<Options>(m, "Options")
      .def(py::init<double, double, int64_t, double, int, bool, double, double,
                    const std::vector<std::tuple<int, double, double, double>>&>());
  bind_plan(m);
  m.def("run", &run_laid_out);
  m.def("use_tensors", [](const py::capsule& table, const std::vector<py::type>& types) {
    tensors().use(table, types);
  });
  m.def("is_plain", &is_plain);
  m.def("run_plain", &run_plain);
  m.def("compare_columns", &compare_columns);
  py::class_<KdMemory>(m, "Memory", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_buffer([](const KdMemory& memory) {
        const auto bytes = static_cast<py::ssize_t>(memory.bytes());
        return py::buffer_info(memory.data(), 1, "B", 1, {bytes}, {1});
      });
  m.def("release_memory", &kd_release_memory);
  m.def("instruction_set", [] { return kd_set().name; });
  m.def("openmp_library", &kd_openmp_library);
}
