// Numpy arrays as kernels see them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cudasim.h"

namespace cudasim {

namespace py = pybind11;

// An array of NaN, so that what a kernel forgets to write shows.
template <class T>
py::array_t<T> unwritten(const std::vector<py::ssize_t>& shape) {
  py::array_t<T> a(shape);
  std::fill_n(a.mutable_data(), a.size(), static_cast<T>(NAN));
  return a;
}

void bind_self_test(py::module_& m);

}  // namespace cudasim
