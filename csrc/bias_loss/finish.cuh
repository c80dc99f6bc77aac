// What the last block of a forward launch does with everybody's partial results: variances, extrema, running minimum,
// weights, the reduced loss.
#pragma once

#include "../feature_variance/moments.cuh"
#include "../math/bias_weight.h"
#include "scores.cuh"

namespace biasloss {

// Shared memory has room for a value of each.
constexpr unsigned kMostWarps = largest_block(sizeof(float)) / kWarpSize;

// Merges the splits of every sample. Leaves the variances where the weights will be, and the samples' losses before
// their weights; returns this thread's share of the extrema and of the denominator.
template <class T, class Acc>
__device__ __forceinline__ void merge_splits(const ForwardParameters<T, Acc>& p, Extrema<Acc>& extrema,
                                             Acc& denominator) {
  const int64_t samples = p.scores.samples;
  const int64_t blocks = gridDim.x;
  const unsigned groups = blockDim.x / p.lanes_per_sample;
  const unsigned lane = threadIdx.x % p.lanes_per_sample;
  for (int64_t first = 0; first < samples; first += groups) {
    const int64_t sample = first + threadIdx.x / p.lanes_per_sample;
    Moments<Acc> moments = {Acc(0), Acc(0), Acc(0)};
    Acc loss = 0;
    if (sample < samples) {
      for (unsigned split = lane; split < p.splits; split += p.lanes_per_sample) {
        const int64_t block = sample * p.splits + split;
        if (p.variance == nullptr) moments = merge(moments, read_moments(p.partial, blocks, block));
        loss += __ldcg(p.partial + 3 * blocks + block);
        denominator += __ldcg(p.partial + 4 * blocks + block);
      }
    }
    loss = warp_reduce(loss, Add(), p.lanes_per_sample);
    if (p.variance == nullptr) moments = warp_reduce(moments, Merge(), p.lanes_per_sample);
    if (sample < samples && lane == 0) {
      const Acc variance = p.variance == nullptr ? unbiased_variance(moments) : __ldg(p.variance + sample);
      extrema = merge(extrema, extrema_of(variance));
      p.weight[sample] = variance;
      p.sample_loss[sample] = loss;
    }
  }
}

template <class T, class Acc>
__device__ __forceinline__ void finish_batch(const ForwardParameters<T, Acc>& p) {
  BIASLOSS_SHARED(Extrema<Acc>, warp_extrema, kMostWarps);
  BIASLOSS_SHARED(Acc, warp_sum, kMostWarps);
  Extrema<Acc> extrema = empty_extrema<Acc>();
  Acc denominator = 0;
  merge_splits(p, extrema, denominator);
  extrema = block_reduce<Extrema<Acc>>(extrema, warp_extrema, Merge());
  denominator = block_reduce<Acc>(denominator, warp_sum, Add());
  if (p.extrema != nullptr) extrema = {__ldg(p.extrema), __ldg(p.extrema + 1)};

  const Acc min = -extrema.negated_min;
  Acc low = min;
  if (p.running_min != nullptr) {
    const Acc running_min = static_cast<Acc>(*p.running_min);
    low = running_min < min ? running_min : min;
  }
  const bool finite = is_finite_batch(extrema);
  Acc total = 0;
  for (int64_t sample = threadIdx.x; sample < p.scores.samples; sample += blockDim.x) {
    const Acc weight = finite ? bias_weight(p.weight[sample], low, extrema, p.alpha, p.beta) : static_cast<Acc>(NAN);
    const Acc loss = weight * p.sample_loss[sample];
    p.weight[sample] = weight;
    total += loss;
    // With several positions a second launch weighs them.
    if (p.reduction == Reduction::kNone && p.scores.positions == 1) p.loss[sample] = loss;
  }
  total = block_reduce<Acc>(total, warp_sum, Add());
  if (threadIdx.x != 0) return;
  // Behind the barriers of the reduction: everyone has read the old running minimum.
  if (p.running_min != nullptr && p.update_running_min && finite && min < *p.running_min)
    *p.running_min = static_cast<float>(min);
  const bool mean = p.reduction == Reduction::kMean;
  *p.denominator = mean ? denominator : Acc(1);
  if (p.reduction != Reduction::kNone) *p.loss = mean ? total / denominator : total;
}

}  // namespace biasloss
