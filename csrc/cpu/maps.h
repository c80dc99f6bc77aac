// Feature maps as the CPU kernels see them: channels_last in memory, rows of channels. Plain arrays, since the
// launchers of CUDA kernels include this file, and nvcc 13.0 loses the length of std::array<int64_t, 4> in it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../simd/types.h"
#include "empty.h"

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

// Of elements as the SIMD kernels name them.
template <class T>
inline constexpr ScalarType dtype_of = ScalarType::Float;
template <>
inline constexpr ScalarType dtype_of<double> = ScalarType::Double;
template <>
inline constexpr ScalarType dtype_of<Float16> = ScalarType::Half;
template <>
inline constexpr ScalarType dtype_of<BFloat16> = ScalarType::BFloat16;

// Raises unless t is (N, C, H, W), dense in channels_last order: the callers in Python see to that.
inline MapShape map_shape(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected a map of shape (N, C, H, W), got ", t.dim(), " dimensions");
  const MapShape s = {t.size(0), t.size(1), t.size(2), t.size(3)};
  const int64_t expected[4] = {s.positions() * s.channels, 1, s.width * s.channels, s.channels};
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) <= 1 || t.stride(d) == expected[d] || t.numel() == 0, name,
                    ": expected a dense channels_last map, got stride ", t.stride(d), " in dimension ", d);
  return s;
}

inline Tensor empty_map(const MapShape& s, ScalarType dtype) {
  const int64_t sizes[4] = {s.samples, s.channels, s.height, s.width};
  const int64_t column = std::max<int64_t>(s.channels, 1), row = column * std::max<int64_t>(s.width, 1);
  const int64_t strides[4] = {row * std::max<int64_t>(s.height, 1), 1, row, column};
  return empty_strided(4, sizes, strides, dtype);
}

// A dense tensor of the accumulation dtype: per-channel values, weights.
template <class T>
const T* values_of(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous(), name, ": expected ", count, " contiguous values, got ",
                  t.numel());
  STD_TORCH_CHECK(t.scalar_type() == dtype_of<T>, name, ": expected ", sizeof(T) == 8 ? "float64" : "float32",
                  " values");
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* values_of(const std::optional<Tensor>& t, int64_t count, const char* name) {
  return t.has_value() ? values_of<T>(*t, count, name) : nullptr;
}

// Of a matrix that an op made.
template <class T>
T* row_of(const Tensor& matrix, int64_t row) {
  return static_cast<T*>(matrix.mutable_data_ptr()) + row * matrix.size(1);
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
