// New CPU tensors by the C shim: torch::stable::empty looks the operator up by its name, which takes longer than the
// allocation, at every call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace biasloss {

inline torch::stable::Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                           torch::headeronly::ScalarType dtype) {
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes, strides, number, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// Contiguous.
inline torch::stable::Tensor empty_tensor(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) {
  constexpr size_t kMostDimensions = 4;
  STD_TORCH_CHECK(sizes.size() <= kMostDimensions, "empty_tensor: at most 4 dimensions, got ", sizes.size());
  int64_t strides[kMostDimensions] = {};
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype);
}

// torch::stable::empty_like.
inline torch::stable::Tensor empty_tensor_like(const torch::stable::Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::empty_like(t);
  return empty_strided(t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type());
}

}  // namespace biasloss
