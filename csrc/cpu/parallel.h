// Splits work among threads: those of the team while a program runs, torch's own elsewhere.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "team.h"

namespace biasloss {

// Elements of work below which waking another thread costs more than it brings.
constexpr int64_t kElementsPerThread = 131072;
// The same where the other threads are awake; and shares for each of them, so that one which is held up holds up
// little.
constexpr int64_t kElementsPerTeamShare = 8192, kSharesPerTeamThread = 4;

// Calls body(share, shares) for every share in [0, shares): as many as threads are worth waking for `elements` of work.
// Several kinds of work in one region are each cut into `shares` equal parts, so that all threads end together.
template <class Body>
void parallel_shares(int64_t elements, const Body& body) {
  if (const int64_t size = team_size(); size > 0) {
    const int64_t most = size == 1 ? 1 : size * kSharesPerTeamThread;
    const int64_t shares = std::clamp<int64_t>(elements / kElementsPerTeamShare, 1, most);
    if (shares == 1) return body(0, 1);
    const auto of_share = [&](int64_t share) { body(share, shares); };
    const auto call = [](const void* of, int64_t share) { (*static_cast<decltype(of_share)*>(of))(share); };
    return team_shares(shares, call, &of_share);
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t shares = std::clamp<int64_t>(elements / kElementsPerThread, 1, threads);
  if (shares == 1) return body(0, 1);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) body(share, shares);
  });
}

}  // namespace biasloss
