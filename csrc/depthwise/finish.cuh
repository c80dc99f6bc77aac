// The second stage of every sum over a batch: the partial results of the blocks, in a fixed order.
#pragma once

#include "../cuda/portable.cuh"
#include "../math/moments.h"

namespace biasloss {

constexpr unsigned kFinishThreads = 256;
constexpr unsigned kStrands = kFinishThreads / kWarpSize;  // warp w takes partials w, w + kStrands, ...

// moments (2, C) from partial (3, blocks, C); 32 channels a block.
template <class Acc>
__global__ void __launch_bounds__(kFinishThreads)
    depthwise_moments_kernel(const Acc* partial, int64_t blocks, unsigned channels, Acc* moments) {
  BIASLOSS_SHARED(Moments<Acc>, strand_total, kFinishThreads);
  const unsigned lane = threadIdx.x % kWarpSize, strand = threadIdx.x / kWarpSize;
  const unsigned channel = blockIdx.x * kWarpSize + lane;
  Moments<Acc> total = {};
  if (channel < channels)
    for (int64_t block = strand; block < blocks; block += kStrands) {
      const Acc* p = partial + block * channels + channel;
      total = merge(total, Moments<Acc>{p[0], p[blocks * channels], p[2 * blocks * channels]});
    }
  strand_total[threadIdx.x] = total;
  __syncthreads();
  if (strand != 0 || channel >= channels) return;
  for (unsigned s = 1; s < kStrands; ++s) total = merge(total, Moments<Acc>(strand_total[s * kWarpSize + lane]));
  moments[channel] = total.mean;
  moments[channels + channel] = total.m2 / total.count;
}

// From partial (blocks, taps + 2, C): grad_weight (C, taps) and sums (2, C), either of which may be null.
template <class Acc>
__global__ void __launch_bounds__(kFinishThreads)
    depthwise_sums_kernel(const Acc* partial, int64_t blocks, unsigned channels, unsigned taps, Acc* grad_weight,
                          Acc* sums) {
  BIASLOSS_SHARED(Acc, strand_total, kFinishThreads);
  const unsigned lane = threadIdx.x % kWarpSize, strand = threadIdx.x / kWarpSize;
  const unsigned length = (taps + 2) * channels;
  const unsigned i = blockIdx.x * kWarpSize + lane;
  Acc total = 0;
  if (i < length)
    for (int64_t block = strand; block < blocks; block += kStrands) total += partial[block * length + i];
  strand_total[threadIdx.x] = total;
  __syncthreads();
  if (strand != 0 || i >= length) return;
  for (unsigned s = 1; s < kStrands; ++s) total += strand_total[s * kWarpSize + lane];
  const unsigned row = i / channels, channel = i % channels;
  if (row < taps) {
    if (grad_weight != nullptr) grad_weight[int64_t(channel) * taps + row] = total;
  } else if (sums != nullptr) {
    sums[(row - taps) * channels + channel] = total;
  }
}

}  // namespace biasloss
