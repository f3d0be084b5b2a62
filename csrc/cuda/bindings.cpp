// The Python face of csrc/cuda: raw pointers and sizes, checked by kdkernels/checks.py and laid out
// by kdkernels/backends/cuda.py. Knows nothing of torch.
#include "../plan_bindings.h"

#include <string>

#include "general.h"
#include "run.h"

namespace {

// `plan`: null for the kernels of the forward KL alone; with one, `teacher` is not looked at.
void run(const Plan* plan, double z_loss, uintptr_t student, uintptr_t teacher, uintptr_t labels,
         uintptr_t weight, uintptr_t grad, uintptr_t loss, uintptr_t soft, uintptr_t hard,
         uintptr_t num_items, uintptr_t grad_scale, uintptr_t workspace, const Rows& student_rows,
         const Rows& teacher_rows, const Rows& grad_rows, int64_t rows, int64_t classes,
         int student_dtype, int teacher_dtype, bool labels_are_int64, double temperature,
         double alpha, int64_t ignore_index, double label_smoothing, int reduction,
         bool distill_ignored, int device, uintptr_t stream) {
  KdCudaProblem p = {};
  p.z_loss = z_loss;
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
  p.soft_factor = temperature * temperature;
  p.alpha = alpha;
  p.label_smoothing = label_smoothing;
  p.out = {static_cast<KdReduction>(reduction),
           p.student_dtype == kFloat64,
           pointer<void>(loss),
           pointer<void>(soft),
           pointer<void>(hard),
           pointer<const double>(num_items)};
  p.grad_scale = pointer<double>(grad_scale);
  if (!plan) return kd_cuda_run(p, device, pointer<void>(stream), pointer<void>(workspace));
  KdGeneralProblem q = {};
  static_cast<KdLoss&>(q) = p;
  q.plan = *plan;
  q.out = p.out;
  q.grad_scale = p.grad_scale;
  kd_general_run(q, device, pointer<void>(stream), pointer<void>(workspace));
}

void scale(uintptr_t grad, int dtype, const Rows& grad_rows, int64_t rows, int64_t classes,
           uintptr_t incoming, int incoming_dtype, int64_t incoming_stride, uintptr_t grad_scale,
           int device, uintptr_t stream) {
  KdScaling s = {};
  s.grad = pointer<void>(grad);
  s.dtype = static_cast<KdDtype>(dtype);
  s.grad_rows = rows_of(grad_rows);
  s.rows = rows;
  s.classes = classes;
  s.incoming = pointer<const void>(incoming);
  s.incoming_dtype = static_cast<KdDtype>(incoming_dtype);
  s.incoming_stride = incoming_stride;
  s.grad_scale = pointer<const double>(grad_scale);
  kd_cuda_scale(s, device, pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of kdkernels; use kdkernels.kd_loss.";
  m.attr("workspace_bytes") = kWorkspaceBytes;
  m.attr("architectures") = KD_ARCHITECTURES;
  bind_plan(m);
  m.def("general_bytes", &kd_general_bytes);
  m.def("run", &run, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("scale", &scale, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("why_not", [](int device) { return std::string(kd_cuda_why_not(device)); });
}
