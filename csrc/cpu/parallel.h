// Splits work among torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace biasloss {

// Elements of work below which waking another thread costs more than it brings.
constexpr int64_t kElementsPerThread = 131072;

// Calls body(share, shares) for every share in [0, shares): as many as threads are worth waking for `elements` of work.
// Several kinds of work in one region are each cut into `shares` equal parts, so that all threads end together.
template <class Body>
void parallel_shares(int64_t elements, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t shares = std::clamp<int64_t>(elements / kElementsPerThread, 1, threads);
  if (shares == 1) return body(0, 1);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) body(share, shares);
  });
}

}  // namespace biasloss
