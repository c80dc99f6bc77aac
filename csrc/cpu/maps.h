// Feature maps as the CPU kernels see them: channels_last in memory, rows of channels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "../simd/types.h"

namespace biasloss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct MapShape {
  int64_t samples, channels, height, width;
  int64_t positions() const { return height * width; }
  int64_t rows() const { return samples * positions(); }
};

inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Raises unless t is (N, C, H, W), dense in channels_last order: the callers in Python see to that.
inline MapShape map_shape(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected a map of shape (N, C, H, W), got ", t.dim(), " dimensions");
  const MapShape s = {t.size(0), t.size(1), t.size(2), t.size(3)};
  const std::array<int64_t, 4> expected = {s.positions() * s.channels, 1, s.width * s.channels, s.channels};
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) <= 1 || t.stride(d) == expected[d] || t.numel() == 0, name,
                    ": expected a dense channels_last map, got stride ", t.stride(d), " in dimension ", d);
  return s;
}

// Past the dispatcher, which takes longer than some of the kernels.
inline Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  const int32_t type = dtype == ScalarType::Double     ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float32();
  AtenTensorHandle made = nullptr;
  const auto error = aoti_torch_empty_strided(dimensions, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &made);
  STD_TORCH_CHECK(error == 0, "a tensor could not be allocated");
  return Tensor(made);
}

inline Tensor empty_map(const MapShape& s, ScalarType dtype) {
  const std::array<int64_t, 4> sizes = {s.samples, s.channels, s.height, s.width};
  const int64_t c = std::max<int64_t>(1, s.channels), row = c * std::max<int64_t>(1, s.width);
  const std::array<int64_t, 4> strides = {row * std::max<int64_t>(1, s.height), 1, row, c};
  return empty_strided(4, sizes.data(), strides.data(), dtype);
}

inline Tensor empty_tensor(std::initializer_list<int64_t> size, ScalarType dtype) {
  std::array<int64_t, 4> strides = {};
  int64_t stride = 1;
  for (auto d = static_cast<int64_t>(size.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, size.begin()[d]);
  }
  return empty_strided(static_cast<int64_t>(size.size()), size.begin(), strides.data(), dtype);
}

// A dense tensor of the accumulation dtype: per-channel values, weights.
template <class T>
const T* values_of(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous(), name, ": expected ", count, " contiguous values, got ",
                  t.numel());
  STD_TORCH_CHECK(t.scalar_type() == (sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float), name, ": expected ",
                  sizeof(T) == 8 ? "float64" : "float32", " values");
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* values_of(const std::optional<Tensor>& t, int64_t count, const char* name) {
  return t.has_value() ? values_of<T>(*t, count, name) : nullptr;
}

// Calls f(element, accumulator) with values of the types that belong to a dtype: the element as the SIMD kernels name
// it.
template <class F>
auto with_element(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double(), double());
    case ScalarType::Half:
      return f(Float16(), float());
    case ScalarType::BFloat16:
      return f(BFloat16(), float());
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Float, "expected float16, bfloat16, float32 or float64");
      return f(float(), float());
  }
}

}  // namespace biasloss
