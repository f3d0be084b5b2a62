// How Python fills in a KdPlan: the same for every device. Included once by each module's bindings.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "plan.h"

namespace {

typedef std::tuple<int64_t, int64_t, int64_t> Rows;

KdRows rows_of(const Rows& r) { return {std::get<0>(r), std::get<1>(r), std::get<2>(r)}; }

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A divergence of a mixture: kind, weight, parameter, second, and per row the addresses of weights
// and parameters, or 0.
typedef std::tuple<int, double, double, double, uintptr_t, uintptr_t> TermOf;

// What a call asks for that is more than one divergence of the logits as they are.
struct Plan : KdPlan {
  Plan() : KdPlan{} { student_scale = teacher_scale = teacher_share = 1; }

  // Where they begin, for the passes that are of them.
  int add_terms(const std::vector<TermOf>& mixture) {
    if (mixture.size() > kMaxTerms || terms + mixture.size() > kMaxPlanTerms || mixture.empty())
      throw std::invalid_argument("too many divergences");
    const int first = terms;
    for (const auto& [kind, share, parameter, second, weights, parameters] : mixture)
      term[terms++] = {static_cast<KdDivergence>(kind),
                       share,
                       parameter,
                       second,
                       pointer<const double>(weights),
                       pointer<const double>(parameters)};
    return first;
  }

  void add_pass(double temperature, double teacher_temperature, double weight, bool added,
                int first, int count) {
    if (passes == kMaxPasses) throw std::invalid_argument("too many temperatures or divergences");
    pass[passes++] = {temperature, teacher_temperature, weight, added, first, count};
  }

  void add_teacher(uintptr_t logits, int dtype, const Rows& rows, double weight) {
    if (teachers == kMaxTeachers) throw std::invalid_argument("too many teachers");
    teacher[teachers++] = {pointer<const void>(logits), static_cast<KdDtype>(dtype), rows_of(rows),
                           weight};
  }

  void set_logits(double softcap, double student_scale, double teacher_scale,
                  uintptr_t student_bias, uintptr_t teacher_bias, double teacher_share) {
    this->softcap = softcap;
    this->student_scale = student_scale;
    this->teacher_scale = teacher_scale;
    this->student_bias = pointer<const double>(student_bias);
    this->teacher_bias = pointer<const double>(teacher_bias);
    this->teacher_share = teacher_share;
  }

  void set_rows(uintptr_t temperature, uintptr_t sample_weight, uintptr_t metrics) {
    row_temperature = pointer<const double>(temperature);
    this->sample_weight = pointer<const double>(sample_weight);
    this->metrics = pointer<double>(metrics);
  }

  void set_top_k(uintptr_t values, uintptr_t indices, int64_t k, int tail) {
    top_k = {pointer<const double>(values), pointer<const int64_t>(indices), k,
             static_cast<KdTail>(tail)};
  }

  void set_switches(bool standardize, bool scale_by_t2, bool sum_added, int ensemble) {
    this->standardize = standardize;
    this->sum_added = sum_added;
    this->scale_by_t2 = scale_by_t2;
    this->ensemble = static_cast<KdEnsemble>(ensemble);
  }
};

// `module_local`: each module has its own, whichever is loaded first.
void bind_plan(pybind11::module_& m) {
  pybind11::class_<Plan>(m, "Plan", pybind11::module_local())
      .def(pybind11::init<>())
      .def("add_terms", &Plan::add_terms)
      .def("add_pass", &Plan::add_pass)
      .def("add_teacher", &Plan::add_teacher)
      .def("set_logits", &Plan::set_logits)
      .def("set_rows", &Plan::set_rows)
      .def("set_top_k", &Plan::set_top_k)
      .def("set_switches", &Plan::set_switches);
}

}  // namespace
