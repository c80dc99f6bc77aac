// Per-sample variance and its extrema over the batch, in one launch.
#pragma once

#include "../cuda/block_reduce.cuh"
#include "../cuda/last_block.cuh"
#include "../math/bias_weight.h"
#include "moments.cuh"

namespace biasloss {

constexpr unsigned kFeatureWarps = kFeatureThreads / kWarpSize;

template <class T, class Acc>
__global__ void __launch_bounds__(kFeatureThreads) feature_variance_kernel(const FeatureVarianceParameters<T, Acc> p) {
  BIASLOSS_SHARED(Moments<Acc>, warp_moments, kFeatureWarps);
  BIASLOSS_SHARED(Extrema<Acc>, warp_extrema, kFeatureWarps);
  BIASLOSS_SHARED(bool, is_last_block, 1);
  const int64_t blocks = gridDim.x;
  const int64_t sample = blockIdx.x / p.splits;

  const Moments<Acc> m = warp_reduce(moments_of_slice<T, Acc>(p.features, sample, blockIdx.x % p.splits), Merge());
  if (lane_index() == 0) warp_moments[warp_index()] = m;
  __syncthreads();
  if (threadIdx.x == 0) {
    Moments<Acc> total = warp_moments[0];
    for (unsigned warp = 1; warp < kFeatureWarps; ++warp) total = merge(total, Moments<Acc>(warp_moments[warp]));
    write_moments(p.partial, blocks, blockIdx.x, total);
    is_last_block[0] = draw_last_ticket(p.ticket);
  }
  __syncthreads();
  if (!is_last_block[0]) return;
  __threadfence();

  Extrema<Acc> extrema = empty_extrema<Acc>();
  const unsigned groups = kFeatureThreads / p.lanes_per_sample;
  const unsigned lane = threadIdx.x % p.lanes_per_sample;
  for (int64_t first = 0; first < p.samples; first += groups) {
    const int64_t i = first + threadIdx.x / p.lanes_per_sample;
    Moments<Acc> total = {Acc(0), Acc(0), Acc(0)};
    if (i < p.samples)
      for (unsigned split = lane; split < p.splits; split += p.lanes_per_sample)
        total = merge(total, read_moments(p.partial, blocks, i * p.splits + split));
    total = warp_reduce(total, Merge(), p.lanes_per_sample);
    if (i < p.samples && lane == 0) {
      const Acc variance = unbiased_variance(total);
      p.variance[i] = variance;
      extrema = merge(extrema, extrema_of(variance));
    }
  }
  extrema = block_reduce<Extrema<Acc>>(extrema, warp_extrema, Merge());
  if (threadIdx.x == 0) {
    p.extrema[0] = extrema.negated_min;
    p.extrema[1] = extrema.max;
  }
}

}  // namespace biasloss
