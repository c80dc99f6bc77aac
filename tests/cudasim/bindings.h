// Numpy arrays as kernels see them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cudasim.h"

namespace cudasim {

namespace py = pybind11;
using Array = py::array;

template <class T>
T* data_of(const Array& a) {
  return const_cast<T*>(static_cast<const T*>(a.data()));
}

template <class T>
T* data_of(const std::optional<Array>& a) {
  return a.has_value() ? data_of<T>(*a) : nullptr;
}

// In elements; 0 for a dimension that the array does not have.
inline int64_t stride_of(const Array& a, int dimension) {
  return dimension < a.ndim() ? a.strides(dimension) / a.itemsize() : 0;
}

// An array of NaN, so that what a kernel forgets to write shows.
template <class T>
py::array_t<T> unwritten(const std::vector<py::ssize_t>& shape) {
  py::array_t<T> a(shape);
  std::fill_n(a.mutable_data(), a.size(), static_cast<T>(NAN));
  return a;
}

// Numpy has no bfloat16: such arrays come as uint16, and the dtype by name.
template <class F>
auto with_types(const std::string& dtype, F&& f) {
  if (dtype == "float16") return f(__half(), float());
  if (dtype == "bfloat16") return f(__nv_bfloat16(), float());
  if (dtype == "float64") return f(double(), double());
  if (dtype == "float32") return f(float(), float());
  throw std::invalid_argument("unknown dtype " + dtype);
}

void bind_forward(py::module_& m);
void bind_backward(py::module_& m);
void bind_self_test(py::module_& m);
void bind_depthwise_forward(py::module_& m);
void bind_depthwise_backward(py::module_& m);

}  // namespace cudasim
