// The Python face of csrc/cpu: raw pointers and sizes, checked by kdkernels/checks.py and laid
// out by kdkernels/backends/cpu.py. Knows nothing of torch.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/run.h"

namespace py = pybind11;

namespace {

typedef std::tuple<int64_t, int64_t, int64_t> Rows;

KdRows rows_of(const Rows& r) { return {std::get<0>(r), std::get<1>(r), std::get<2>(r)}; }

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Holding the GIL costs other threads little below this, releasing it costs this call something.
constexpr int64_t kReleaseWork = 16384;

double run(uintptr_t student, uintptr_t teacher, uintptr_t labels, uintptr_t weight, uintptr_t grad,
           uintptr_t loss, uintptr_t soft, uintptr_t hard, const Rows& student_rows,
           const Rows& teacher_rows, const Rows& grad_rows, int64_t rows, int64_t classes,
           int student_dtype, int teacher_dtype, bool labels_are_int64, double temperature,
           double alpha, int64_t ignore_index, double label_smoothing, int reduction,
           bool distill_ignored, int threads) {
  KdProblem p = {};
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
  p.distill_ignored = distill_ignored;
  p.want_soft = alpha > 0 || soft;
  p.want_hard = labels && (alpha < 1 || hard);
  p.rows = rows;
  p.classes = classes;
  p.ignore_index = ignore_index;
  p.temperature = temperature;
  p.alpha = alpha;
  p.label_smoothing = label_smoothing;
  const KdOutput out = {static_cast<KdReduction>(reduction), p.student_dtype == kFloat64,
                        pointer<void>(loss), pointer<void>(soft), pointer<void>(hard)};
  KdStatus status;
  {
    std::optional<py::gil_scoped_release> unlocked;
    if (rows * classes >= kReleaseWork) unlocked.emplace();
    status = kd_run(p, out, threads);
  }
  if (status.bad_label_row >= 0)
    throw py::index_error("labels[" + std::to_string(status.bad_label_row) + "] is " +
                          std::to_string(p.label(status.bad_label_row)) +
                          ": expected 0 <= label < " + std::to_string(classes) +
                          " or ignore_index " + std::to_string(ignore_index));
  return status.grad_scale;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Compiled CPU kernels of kdkernels; use kdkernels.kd_loss.";
  kd_openmp_library();  // found now, so that a fork is noticed whoever used the threads before
  m.def("run", &run);
  py::class_<KdMemory>(m, "Memory", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_buffer([](const KdMemory& memory) {
        const auto bytes = static_cast<py::ssize_t>(memory.bytes());
        return py::buffer_info(memory.data(), 1, "B", 1, {bytes}, {1});
      });
  m.def("release_memory", &kd_release_memory);
  m.def("instruction_set", &kd_instruction_set);
  m.def("openmp_library", &kd_openmp_library);
}
