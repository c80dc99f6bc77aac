// Tensors as kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "../dense_samples.h"
#include "portable.cuh"

namespace biasloss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* data_of(const std::optional<Tensor>& t) {
  return t.has_value() ? data_of<T>(*t) : nullptr;
}

template <class T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

inline Tensor with_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Calls f(element, accumulator) with a value of the C++ types that belong to a dtype.
template <class F>
auto with_types(ScalarType dtype, F&& f) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Double,
                  "expected float16, bfloat16, float32 or float64");
  if (dtype == ScalarType::Half) return f(__half(), float());
  if (dtype == ScalarType::BFloat16) return f(__nv_bfloat16(), float());
  if (dtype == ScalarType::Double) return f(double(), double());
  return f(float(), float());
}

}  // namespace biasloss
