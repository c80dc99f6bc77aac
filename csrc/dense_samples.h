#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace biasloss {

// Whether the dimensions behind the first form one run without gaps, in whatever order: contiguous, channels_last,
// permuted.
inline bool samples_are_dense(const torch::stable::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> stride_and_size;
  for (int64_t d = 1; d < t.dim(); ++d)
    if (t.size(d) != 1) stride_and_size.emplace_back(t.stride(d), t.size(d));
  std::sort(stride_and_size.begin(), stride_and_size.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : stride_and_size) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace biasloss
