// Checks of what programs hand to the kernels on bytes.
#pragma once

#include <algorithm>

#include "../cpu/maps.h"
#include "kernels.h"

namespace biasloss {

inline Levels levels_of(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == 2 && t.is_contiguous(),
                  "levels: expected 2 float32 values (step, zero), got ", t.numel());
  const float* values = static_cast<const float*>(t.const_data_ptr());
  STD_TORCH_CHECK(values[0] > 0 && values[1] >= 0 && values[1] <= 255,
                  "levels: expected a positive step and a zero from 0 to 255, got ", values[0], " and ", values[1]);
  return {values[0], static_cast<int32_t>(values[1])};
}

// Of a dense channels_last map or of a matrix.
inline MapShape shape_of(const Tensor& x, const char* name) {
  if (x.dim() != 2) return map_shape(x, name);
  STD_TORCH_CHECK(x.is_contiguous(), name, ": expected a contiguous matrix");
  return {x.size(0), x.size(1), 1, 1};
}

inline MapShape bytes_shape(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte, name, ": expected a map of bytes (uint8)");
  return shape_of(x, name);
}

inline Tensor empty_like_map(const Tensor& x, const MapShape& s, ScalarType dtype) {
  return x.dim() == 2 ? empty_tensor({s.samples, s.channels}, dtype) : empty_map(s, dtype);
}

inline const uint8_t* bytes_of(const Tensor& x) { return static_cast<const uint8_t*>(x.const_data_ptr()); }

template <class T>
const T* checked_values(const Tensor& t, ScalarType dtype, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == count, name, ": expected ", count,
                  " contiguous values of the right dtype, got ", t.numel());
  return static_cast<const T*>(t.const_data_ptr());
}

constexpr int64_t padded_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace biasloss
