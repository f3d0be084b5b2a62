// Tensors as Python hands them over, looked at without knowing the library that made them: DLPack's
// table of C functions describes one in 75 ns, where each attribute read from Python takes as long.
// https://dmlc.github.io/dlpack/latest/c_api.html, DLPackExchangeAPI, version 1.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "problem.h"

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void *allocate, *share, *to_python;  // not used here
  int (*describe)(void* python_object, DLTensor* out);
};

// What Python calls tensors, and how they are described. Subclasses may mean something else by
// their elements, and are not looked at.
class KdTensors {
 public:
  void use(const pybind11::capsule& table, const std::vector<pybind11::type>& types) {
    const auto* api =
        static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (!api) throw pybind11::error_already_set();
    if (api->version.major != 1 || !api->describe)
      throw std::invalid_argument("a table of DLPack that is not of version 1");
    api_ = api;
    types_ = types;
  }

  // Whether `object` is a contiguous tensor in the memory of this process, and then what it is.
  bool describe(pybind11::handle object, DLTensor& out) const {
    if (!is_tensor(object)) return false;
    if (api_->describe(object.ptr(), &out)) {
      PyErr_Clear();  // of a layout or on a device that DLPack does not know
      return false;
    }
    if (out.device.type != 1 || out.dtype.lanes != 1 || !out.data) return false;
    out.data = static_cast<char*>(out.data) + out.byte_offset;
    int64_t expected = 1;
    for (int i = out.ndim - 1; i >= 0; --i) {
      if (out.strides && out.shape[i] > 1 && out.strides[i] != expected) return false;
      expected *= out.shape[i];
    }
    return expected > 0;  // an empty one is not worth the thought
  }

 private:
  bool is_tensor(pybind11::handle object) const {
    for (const pybind11::type& type : types_)
      if (Py_TYPE(object.ptr()) == reinterpret_cast<PyTypeObject*>(type.ptr())) return true;
    return false;
  }

  const DLPackExchangeAPI* api_ = nullptr;
  std::vector<pybind11::type> types_;
};

// The code of a floating-point type, or -1.
inline int float_type(const DLTensor& t) {
  enum { kFloat = 2, kBrain = 4 };
  if (t.dtype.code == kBrain) return t.dtype.bits == 16 ? kBFloat16 : -1;
  if (t.dtype.code != kFloat) return -1;
  return t.dtype.bits == 32   ? kFloat32
         : t.dtype.bits == 16 ? kFloat16
         : t.dtype.bits == 64 ? kFloat64
                              : -1;
}

// Of 32 or 64 bits.
inline bool is_integer(const DLTensor& t) {
  return t.dtype.code == 0 && (t.dtype.bits == 32 || t.dtype.bits == 64);
}

inline int64_t elements(const DLTensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
  return n;
}

inline bool same_shape(const DLTensor& a, const DLTensor& b, int dimensions) {
  for (int i = 0; i < dimensions; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}
