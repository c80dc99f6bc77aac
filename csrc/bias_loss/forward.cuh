// The forward pass in one launch. Every block reads a slice of one sample's features with its feature threads while its
// score threads take some of the sample's rows; the block that finishes last puts the batch together.
#pragma once

#include "../cuda/last_block.cuh"
#include "finish.cuh"

namespace biasloss {

constexpr unsigned kFeatureWarpsOfLoss = kFeatureThreads / kWarpSize;

// Rows of one thread or one warp each: every row is finished by its first thread.
template <class T, class Acc>
__device__ __forceinline__ LossSums<Acc> loss_of_positions(const ForwardParameters<T, Acc>& p, int64_t sample,
                                                           unsigned split, unsigned score_thread) {
  const ScoreBatch<T, Acc>& b = p.scores;
  const unsigned threads_per_row = p.threads_per_row;
  const unsigned thread = score_thread % threads_per_row;
  const int64_t begin = p.split_positions * split;
  const int64_t end = begin + p.split_positions < b.positions ? begin + p.split_positions : b.positions;
  LossSums<Acc> sums = {Acc(0), Acc(0)};
  for (int64_t position = begin + score_thread / threads_per_row; position < end;
       position += p.score_threads / threads_per_row) {
    ClassTarget<Acc> target = {};
    if (thread == 0 && !is_probability(b.target_kind)) target = read_class_target(b, sample, position);
    ScoreRow<Acc> row = scan_row(b, sample, position, thread, threads_per_row);
    if (threads_per_row == kWarpSize) row = warp_reduce(row, Merge());
    if (thread != 0) continue;
    const int64_t index = sample * b.positions + position;
    const Acc row_log_sum = log_sum(row);
    const LossSums<Acc> loss = loss_of_row(b, row, row_log_sum, target);
    p.row_max[index] = row.max;
    p.row_log_sum[index] = row_log_sum;
    if (p.reduction == Reduction::kNone) p.loss[index] = loss.loss;
    sums = merge(sums, loss);
  }
  return sums;
}

// kOnePosition: a sample has one row, which all score threads of its first block share.
template <class T, class Acc, bool kOnePosition>
__global__ void __launch_bounds__(largest_block(sizeof(T)), 1)
    bias_loss_forward_kernel(const ForwardParameters<T, Acc> p) {
  BIASLOSS_SHARED(Moments<Acc>, warp_moments, kFeatureWarpsOfLoss);
  BIASLOSS_SHARED(ScoreRow<Acc>, warp_rows, kMostWarps);
  BIASLOSS_SHARED(LossSums<Acc>, warp_sums, kMostWarps);
  BIASLOSS_SHARED(bool, is_last_block, 1);
  const ScoreBatch<T, Acc>& b = p.scores;
  const int64_t sample = blockIdx.x / p.splits;
  const unsigned split = blockIdx.x % p.splits;
  const unsigned feature_threads = blockDim.x - p.score_threads;
  const unsigned score_warps = p.score_threads / kWarpSize;
  const unsigned lane = lane_index();
  // The first score thread speaks for the block, and holds the target of a shared row.
  const unsigned leader = feature_threads;
  ClassTarget<Acc> target = {};

  if (threadIdx.x < feature_threads) {
    const Moments<Acc> m = warp_reduce(moments_of_slice<T, Acc>(p.features, sample, split), Merge());
    if (lane == 0) warp_moments[warp_index()] = m;
  } else {
    const unsigned score_thread = threadIdx.x - feature_threads;
    if constexpr (kOnePosition) {
      ScoreRow<Acc> row = empty_score_row<Acc>();
      if (split == 0) {
        if (threadIdx.x == leader && !is_probability(b.target_kind)) target = read_class_target(b, sample, 0);
        row = warp_reduce(scan_row(b, sample, 0, score_thread, p.score_threads), Merge());
      }
      if (lane == 0) warp_rows[score_thread / kWarpSize] = row;
    } else {
      const LossSums<Acc> sums = warp_reduce(loss_of_positions(p, sample, split, score_thread), Merge());
      if (lane == 0) warp_sums[score_thread / kWarpSize] = sums;
    }
  }
  __syncthreads();

  if (warp_index() == leader / kWarpSize) {
    Moments<Acc> moments = {Acc(0), Acc(0), Acc(0)};
    if (lane < feature_threads / kWarpSize) moments = warp_moments[lane];
    moments = warp_reduce(moments, Merge());
    LossSums<Acc> sums = {Acc(0), Acc(0)};
    if constexpr (kOnePosition) {
      ScoreRow<Acc> row = empty_score_row<Acc>();
      if (lane < score_warps) row = warp_rows[lane];
      row = warp_reduce(row, Merge());
      if (threadIdx.x == leader && split == 0) {
        const Acc row_log_sum = log_sum(row);
        p.row_max[sample] = row.max;
        p.row_log_sum[sample] = row_log_sum;
        sums = loss_of_row(b, row, row_log_sum, target);
      }
    } else {
      if (lane < score_warps) sums = warp_sums[lane];
      sums = warp_reduce(sums, Merge());
    }
    if (threadIdx.x == leader) {
      write_moments(p.partial, gridDim.x, blockIdx.x, moments);
      p.partial[3 * int64_t(gridDim.x) + blockIdx.x] = sums.loss;
      p.partial[4 * int64_t(gridDim.x) + blockIdx.x] = sums.denominator;
      is_last_block[0] = draw_last_ticket(p.ticket);
    }
  }
  __syncthreads();
  if (!is_last_block[0]) return;
  __threadfence();
  finish_batch(p);
}

// reduction "none" with several positions: their losses wait for the weights, which the first launch knows at its end.
template <class Acc>
__global__ void __launch_bounds__(256)
    weigh_positions_kernel(Acc* loss, const Acc* weight, int64_t rows, int64_t positions) {
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += int64_t(gridDim.x) * blockDim.x)
    loss[row] *= __ldg(weight + row / positions);
}

}  // namespace biasloss
