// What the kernels of the loss are told, and how their launches are laid out. No torch, no CUDA runtime.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../feature_variance/parameters.h"
#include "../math/macros.h"

namespace biasloss {

// torch's numbering
enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };
enum class TargetKind : int { kInt64, kInt32, kUInt8, kProbability, kWideProbability };

BIASLOSS_HOST_DEVICE constexpr bool is_probability(TargetKind kind) { return kind >= TargetKind::kProbability; }

// Threads of a forward block. float64 takes more registers than a block of 512 leaves each thread.
constexpr unsigned largest_block(int64_t element_size) { return element_size == sizeof(double) ? 384 : 512; }

struct ScoreStrides {
  int64_t sample, klass, position;
};

// Scores of `samples` x `classes` x `positions` and what they are compared with.
template <class T, class Acc>
struct ScoreBatch {
  const T* output;
  ScoreStrides output_stride;
  const void* target;  // class indices, contiguous, or probabilities: of type T, or wide ones of type Acc
  TargetKind target_kind;
  ScoreStrides target_stride;  // of probabilities
  const Acc* class_weight;     // null: 1 each
  int64_t samples;
  int64_t positions;
  unsigned classes;
  int64_t ignore_index;
  Acc label_smoothing;
};

template <class T, class Acc>
struct ForwardParameters {
  FeatureBatch<T> features;  // data is null when the variances are given
  const Acc* variance;       // (samples), or null
  const Acc* extrema;        // (2), or null: those of this batch
  ScoreBatch<T, Acc> scores;
  float* running_min;  // null in local mode
  bool update_running_min;
  Acc alpha;
  Acc beta;
  Reduction reduction;

  unsigned splits;            // blocks a sample
  int64_t split_positions;    // positions a block takes
  unsigned score_threads;     // of a block, after its feature threads
  unsigned threads_per_row;   // 1, a warp, or all score threads
  unsigned lanes_per_sample;  // in the last block
  unsigned ticket;

  Acc* partial;      // 5 x (samples * splits): count, mean, m2, loss, denominator
  Acc* sample_loss;  // (samples)
  Acc* loss;
  Acc* weight;
  Acc* row_max;
  Acc* row_log_sum;
  Acc* denominator;
};

template <class T, class Acc>
struct BackwardParameters {
  ScoreBatch<T, Acc> scores;
  T* grad_output;
  ScoreStrides grad_output_stride;
  const Acc* grad_loss;
  int64_t grad_loss_sample_stride;
  int64_t grad_loss_position_stride;
  const Acc* weight;
  const Acc* row_max;
  const Acc* row_log_sum;
  const Acc* denominator;
  unsigned threads_per_row;  // 1, a warp, or the block
  unsigned chunk;            // classes a block takes
};

// How rows of scores are shared out. Side by side along the positions, one thread a row reads coalesced; classes that
// lie side by side, or a single position, take a warp or more a row.
struct ForwardPlan {
  unsigned splits;
  int64_t split_positions;
  unsigned feature_threads;
  unsigned score_threads;
  unsigned threads_per_row;
};

inline unsigned round_up_to_warp(int64_t threads, unsigned most) {
  return static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>((threads + 31) / 32 * 32, 32), most));
}

inline ForwardPlan plan_forward(int64_t samples, int64_t classes, int64_t positions, bool classes_adjacent,
                                bool with_features, int64_t activations, int64_t element_size, int multiprocessors) {
  const unsigned most_score_threads = largest_block(element_size) - kFeatureThreads;
  ForwardPlan plan;
  plan.feature_threads = with_features ? kFeatureThreads : 0;
  plan.splits = with_features ? feature_splits(samples, activations, element_size, multiprocessors) : 1;
  if (positions <= 1) {
    // One warp hides behind the feature stream; without it, or with many classes, a row wants more loads in flight.
    const unsigned fewest = with_features ? 32 : 128;
    plan.score_threads = std::max(fewest, classes <= 2048 ? 32u : classes <= 16384 ? 128u : most_score_threads);
    plan.threads_per_row = plan.score_threads;
  } else {
    plan.threads_per_row = classes_adjacent ? 32 : 1;
    plan.score_threads = round_up_to_warp(positions * plan.threads_per_row, most_score_threads);
    const int64_t rows_at_once = plan.score_threads / plan.threads_per_row;
    const int64_t useful = (positions + rows_at_once - 1) / rows_at_once;
    const int64_t wanted = (16 * int64_t(multiprocessors) + samples - 1) / samples;
    plan.splits = std::max(plan.splits, static_cast<unsigned>(std::min(useful, wanted)));
  }
  plan.split_positions = (positions + plan.splits - 1) / plan.splits;
  return plan;
}

struct BackwardPlan {
  unsigned threads_per_row;
  unsigned threads;
  unsigned chunk;
  unsigned blocks;
  unsigned chunks;
};

inline BackwardPlan plan_backward(int64_t samples, int64_t classes, int64_t positions, bool classes_adjacent) {
  constexpr int64_t kMostBlocks = int64_t(1) << 20;  // beyond it blocks take several rows
  BackwardPlan plan;
  plan.threads = 256;
  plan.threads_per_row = positions > 1 && !classes_adjacent ? 1 : classes <= 512 ? 32 : plan.threads;
  const int64_t rows = samples * positions;
  const int64_t rows_at_once = plan.threads / plan.threads_per_row;
  plan.blocks = static_cast<unsigned>(std::min((rows + rows_at_once - 1) / rows_at_once, kMostBlocks));
  // A row of very many classes is cut up, so that few rows still fill the device. A multiple of 16 bytes of any type.
  const int64_t chunk = plan.threads_per_row == 1 ? 256 : 8192;
  plan.chunk = static_cast<unsigned>(std::max(chunk, (classes / 32768 + 1) * 8));
  plan.chunks = static_cast<unsigned>((classes + plan.chunk - 1) / plan.chunk);
  return plan;
}

}  // namespace biasloss
