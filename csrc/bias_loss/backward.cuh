// The gradient of the scores in one launch, from what the forward pass saved:
// scale * (sum_j q_j * softmax_k - q_k), scale = grad_loss * w / denominator.
#pragma once

#include "scores.cuh"

namespace biasloss {

constexpr unsigned kBackwardThreads = 256;

// Everything that the classes of one row share.
template <class Acc>
struct RowGradient {
  Acc scale;
  Acc max;
  Acc log_sum;
  Acc mass;        // sum of q
  Acc class_mass;  // q of the target class, besides its smoothed part
  int64_t index;   // the target class; -1 for probabilities
  bool ignored;
};

template <class T, class Acc>
__device__ __forceinline__ Acc gradient_of(const ScoreBatch<T, Acc>& b, const RowGradient<Acc>& row, int64_t target,
                                           unsigned k, Acc score) {
  if (row.ignored) return Acc(0);
  const Acc log_p = (score - row.max) - row.log_sum;
  if (!needs_mass(b)) {
    // p - 1 without the cancellation of a confident prediction
    const Acc difference = k == row.index ? exponential_minus_one(log_p) : exponential(log_p);
    return row.scale * (row.mass * difference);
  }
  Acc q = target_mass(b, target, k);
  if (k == row.index) q += row.class_mass;
  return row.scale * (row.mass * exponential(log_p) - q);
}

template <class T, class Acc>
__device__ __forceinline__ RowGradient<Acc> read_row(const BackwardParameters<T, Acc>& p, int64_t sample,
                                                     int64_t position, Acc smooth_mass) {
  const ScoreBatch<T, Acc>& b = p.scores;
  const int64_t index = sample * b.positions + position;
  RowGradient<Acc> row;
  const Acc grad = __ldg(p.grad_loss + sample * p.grad_loss_sample_stride + position * p.grad_loss_position_stride);
  row.scale = grad * __ldg(p.weight + sample) / __ldg(p.denominator);
  row.max = __ldg(p.row_max + index);
  row.log_sum = __ldg(p.row_log_sum + index);
  row.mass = smooth_mass;
  row.class_mass = Acc(0);
  row.index = -1;
  row.ignored = false;
  if (!is_probability(b.target_kind)) {
    const ClassTarget<Acc> target = read_class_target(b, sample, position);
    row.index = target.index;
    row.ignored = target.ignored;
    row.class_mass = (Acc(1) - b.label_smoothing) * target.weight;
    row.mass += row.class_mass;
    if (!target.valid) row.scale = static_cast<Acc>(NAN);
  }
  return row;
}

// Classes first, first + step, ... below end.
template <class T, class Acc>
__device__ __forceinline__ void write_strided(const BackwardParameters<T, Acc>& p, const RowGradient<Acc>& row,
                                              const T* score, int64_t target, T* gradient, unsigned first,
                                              unsigned step, unsigned end) {
  for (unsigned k = first; k < end; k += kScoresInFlight / 2 * step) {
    Acc x[kScoresInFlight / 2];
#pragma unroll
    for (unsigned u = 0; u < kScoresInFlight / 2; ++u)
      if (k + u * step < end) x[u] = static_cast<Acc>(score[(k + u * step) * p.scores.output_stride.klass]);
#pragma unroll
    for (unsigned u = 0; u < kScoresInFlight / 2; ++u)
      if (k + u * step < end)
        gradient[(k + u * step) * p.grad_output_stride.klass] =
            static_cast<T>(gradient_of(p.scores, row, target, k + u * step, x[u]));
  }
}

// Adjacent classes whose scores and gradients are equally misaligned.
template <class T, class Acc>
__device__ __forceinline__ void write_vectors(const BackwardParameters<T, Acc>& p, const RowGradient<Acc>& row,
                                              const T* score, T* gradient, unsigned thread, unsigned threads,
                                              unsigned begin, unsigned end) {
  constexpr unsigned kSize = Vector<T>::kSize;
  const AlignedRun aligned = aligned_run(score + begin, end - begin);
  const unsigned body = begin + aligned.head;
  for (unsigned v = thread; v < aligned.vectors; v += kScoreVectorsInFlight * threads) {
    Vector<T> vector[kScoreVectorsInFlight];
#pragma unroll
    for (unsigned u = 0; u < kScoreVectorsInFlight; ++u)
      if (v + u * threads < aligned.vectors) vector[u] = load_vector(score + body + size_t(v + u * threads) * kSize);
#pragma unroll
    for (unsigned u = 0; u < kScoreVectorsInFlight; ++u) {
      if (v + u * threads >= aligned.vectors) continue;
      const unsigned k = body + (v + u * threads) * kSize;
      Acc g[kSize];
#pragma unroll
      for (unsigned i = 0; i < kSize; ++i)
        g[i] = gradient_of<T, Acc>(p.scores, row, 0, k + i, vector[u].template get<Acc>(i));
      store_vector<T, Acc>(gradient + k, g);
    }
  }
  if (thread < aligned.edges()) {
    const unsigned k = begin + aligned.edge(thread);
    gradient[k] = static_cast<T>(gradient_of<T, Acc>(p.scores, row, 0, k, static_cast<Acc>(score[k])));
  }
}

// Sum of q over all classes of a row, by whoever shares the row; every one of them gets it.
template <class T, class Acc>
__device__ __forceinline__ Acc sum_of_mass(const ScoreBatch<T, Acc>& b, int64_t target, unsigned thread,
                                           unsigned threads, SharedPointer<Acc> buffer) {
  Acc mass = 0;
  for (unsigned k = thread; k < b.classes; k += threads) mass += target_mass(b, target, k);
  if (threads == 1) return mass;
  if (threads == kWarpSize) return __shfl_sync(kFullWarp, warp_reduce(mass, Add()), 0);
  return block_reduce<Acc>(mass, buffer, Add());
}

template <class T, class Acc>
__global__ void __launch_bounds__(kBackwardThreads) bias_loss_backward_kernel(const BackwardParameters<T, Acc> p) {
  BIASLOSS_SHARED(Acc, warp_sum, kBackwardThreads / kWarpSize);
  const ScoreBatch<T, Acc>& b = p.scores;
  const unsigned threads = p.threads_per_row;
  const unsigned thread = threadIdx.x % threads;
  const unsigned begin = blockIdx.y * p.chunk;
  const unsigned end = begin + p.chunk < b.classes ? begin + p.chunk : b.classes;
  const bool probabilities = is_probability(b.target_kind);
  const bool adjacent = b.output_stride.klass == 1 && p.grad_output_stride.klass == 1 && threads > 1;
  // Smoothing adds the same to every row of class targets.
  Acc smooth_mass = 0;
  if (!probabilities && needs_mass(b)) smooth_mass = sum_of_mass<T, Acc>(b, 0, threadIdx.x, blockDim.x, warp_sum);

  const int64_t rows = b.samples * b.positions;
  const int64_t rows_at_once = blockDim.x / threads;
  for (int64_t i = blockIdx.x * rows_at_once + threadIdx.x / threads; i < rows; i += gridDim.x * rows_at_once) {
    const int64_t sample = i / b.positions, position = i % b.positions;
    const T* score = b.output + sample * b.output_stride.sample + position * b.output_stride.position;
    T* gradient = p.grad_output + sample * p.grad_output_stride.sample + position * p.grad_output_stride.position;
    RowGradient<Acc> row = read_row(p, sample, position, smooth_mass);
    if (probabilities) {
      const int64_t target = target_row(b, sample, position);
      row.mass = sum_of_mass(b, target, thread, threads, warp_sum);
      write_strided(p, row, score, target, gradient, begin + thread, threads, end);
    } else if (adjacent && elements_to_alignment(score) == elements_to_alignment(static_cast<const T*>(gradient))) {
      write_vectors(p, row, score, gradient, thread, threads, begin, end);
    } else {
      write_strided<T, Acc>(p, row, score, 0, gradient, begin + thread, threads, end);
    }
  }
}

}  // namespace biasloss
