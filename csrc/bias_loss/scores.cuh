// One row of scores: its log-sum-exp and its cross-entropy. A row is one position of one sample.
#pragma once

#include "../cuda/block_reduce.cuh"
#include "../cuda/vector_load.cuh"
#include "../math/score_row.h"
#include "parameters.h"

namespace biasloss {

constexpr unsigned kScoresInFlight = 8;
constexpr unsigned kScoreVectorsInFlight = 4;

// What a row is compared with when the target is a class. `index` is read, and `score` loaded through it, before the
// row is scanned, so that their latency hides behind the scan.
template <class Acc>
struct ClassTarget {
  int64_t index;
  bool ignored;
  bool valid;
  Acc score;
  Acc weight;
};

// Reads nothing through an index that is not a class.
template <class T, class Acc>
__device__ __forceinline__ ClassTarget<Acc> read_class_target(const ScoreBatch<T, Acc>& b, int64_t sample,
                                                              int64_t position) {
  const int64_t row = sample * b.positions + position;
  int64_t index = 0;
  if (b.target_kind == TargetKind::kInt64)
    index = __ldg(static_cast<const int64_t*>(b.target) + row);
  else if (b.target_kind == TargetKind::kInt32)
    index = __ldg(static_cast<const int32_t*>(b.target) + row);
  else
    index = __ldg(static_cast<const uint8_t*>(b.target) + row);
  ClassTarget<Acc> target = {index, index == b.ignore_index, index >= 0 && index < b.classes, Acc(0), Acc(1)};
  if (target.valid) {
    const ScoreStrides& stride = b.output_stride;
    target.score =
        static_cast<Acc>(b.output[sample * stride.sample + index * stride.klass + position * stride.position]);
    if (b.class_weight != nullptr) target.weight = __ldg(b.class_weight + index);
  }
  return target;
}

// Where the probabilities of a row begin: their first element, counted from that of the batch.
template <class T, class Acc>
__device__ __forceinline__ int64_t target_row(const ScoreBatch<T, Acc>& b, int64_t sample, int64_t position) {
  return sample * b.target_stride.sample + position * b.target_stride.position;
}

// Probabilities in the precision that they are given in: float32 ones of 16-bit scores are not rounded.
template <class T, class Acc>
__device__ __forceinline__ Acc probability_at(const ScoreBatch<T, Acc>& b, int64_t i) {
  if (sizeof(T) != sizeof(Acc) && b.target_kind == TargetKind::kWideProbability)
    return static_cast<const Acc*>(b.target)[i];
  return static_cast<Acc>(static_cast<const T*>(b.target)[i]);
}

// The distribution that the scores are compared with, times the class weights: q_k of score_row.h. For a class target
// only its smoothed part, the same for every row; the class itself is added by whoever knows the row's target.
template <class T, class Acc>
__device__ __forceinline__ Acc target_mass(const ScoreBatch<T, Acc>& b, int64_t row, unsigned k) {
  Acc q = b.label_smoothing / static_cast<Acc>(b.classes);
  if (is_probability(b.target_kind)) {
    const Acc p = probability_at(b, row + k * b.target_stride.klass);
    // Without smoothing p stays as it is: infinity * 0 would not.
    q = b.label_smoothing == Acc(0) ? p : p * (Acc(1) - b.label_smoothing) + q;
  }
  return b.class_weight == nullptr ? q : q * __ldg(b.class_weight + k);
}

template <class T, class Acc>
__device__ __forceinline__ bool needs_mass(const ScoreBatch<T, Acc>& b) {
  return is_probability(b.target_kind) || b.label_smoothing != Acc(0);
}

// kMass: with the sums against q, which `target_row` begins.
template <bool kMass, class T, class Acc>
__device__ __forceinline__ void add_class(ScoreRow<Acc>& row, const ScoreBatch<T, Acc>& b, Acc x, int64_t target_row,
                                          unsigned k) {
  if constexpr (kMass)
    add_score(row, x, target_mass(b, target_row, k));
  else
    add_score(row, x);
}

// Classes first, first + step, ... below classes.
template <bool kMass, class T, class Acc>
__device__ __forceinline__ void scan_strided(ScoreRow<Acc>& row, const ScoreBatch<T, Acc>& b, const T* score,
                                             int64_t target, unsigned first, unsigned step, unsigned classes) {
  for (unsigned k = first; k < classes; k += kScoresInFlight * step) {
    Acc x[kScoresInFlight];
    Acc max = row.max;
#pragma unroll
    for (unsigned u = 0; u < kScoresInFlight; ++u) {
      x[u] = row.max;
      if (k + u * step < classes) x[u] = static_cast<Acc>(score[(k + u * step) * b.output_stride.klass]);
    }
#pragma unroll
    for (unsigned u = 0; u < kScoresInFlight; ++u) max = x[u] > max ? x[u] : max;
    row = raise_max(row, max);
#pragma unroll
    for (unsigned u = 0; u < kScoresInFlight; ++u) {
      if (k + u * step < classes) add_class<kMass>(row, b, x[u], target, k + u * step);
    }
  }
}

// The same over adjacent classes, 16 bytes at a time.
template <bool kMass, class T, class Acc>
__device__ __forceinline__ void scan_vectors(ScoreRow<Acc>& row, const ScoreBatch<T, Acc>& b, const T* score,
                                             unsigned thread, unsigned threads) {
  constexpr unsigned kSize = Vector<T>::kSize;
  const AlignedRun aligned = aligned_run(score, b.classes);
  for (unsigned v = thread; v < aligned.vectors; v += kScoreVectorsInFlight * threads) {
    Vector<T> vector[kScoreVectorsInFlight];
#pragma unroll
    for (unsigned u = 0; u < kScoreVectorsInFlight; ++u)
      if (v + u * threads < aligned.vectors)
        vector[u] = load_vector(score + aligned.head + size_t(v + u * threads) * kSize);
    const auto for_each_class = [&](auto&& use) {
#pragma unroll
      for (unsigned u = 0; u < kScoreVectorsInFlight; ++u) {
        if (v + u * threads >= aligned.vectors) continue;
#pragma unroll
        for (unsigned i = 0; i < kSize; ++i)
          use(vector[u].template get<Acc>(i), aligned.head + (v + u * threads) * kSize + i);
      }
    };
    Acc max = row.max;
    for_each_class([&](Acc x, unsigned) { max = x > max ? x : max; });
    row = raise_max(row, max);
    for_each_class([&](Acc x, unsigned k) { add_class<kMass>(row, b, x, 0, k); });
  }
  // Head and tail are fewer than a warp's threads.
  if (thread < aligned.edges()) {
    const unsigned k = aligned.edge(thread);
    const Acc x = static_cast<Acc>(score[k]);
    if (x > row.max) row = raise_max(row, x);
    add_class<kMass>(row, b, x, 0, k);
  }
}

// One thread's share of a row that `threads` threads read together.
template <class T, class Acc>
__device__ __forceinline__ ScoreRow<Acc> scan_row(const ScoreBatch<T, Acc>& b, int64_t sample, int64_t position,
                                                  unsigned thread, unsigned threads) {
  const T* score = b.output + sample * b.output_stride.sample + position * b.output_stride.position;
  ScoreRow<Acc> row = empty_score_row<Acc>();
  const bool vectors = b.output_stride.klass == 1 && threads > 1 && !is_probability(b.target_kind);
  if (vectors && !needs_mass(b))
    scan_vectors<false>(row, b, score, thread, threads);
  else if (vectors)
    scan_vectors<true>(row, b, score, thread, threads);
  else if (!needs_mass(b))
    scan_strided<false, T, Acc>(row, b, score, 0, thread, threads, b.classes);
  else
    scan_strided<true>(row, b, score, target_row(b, sample, position), thread, threads, b.classes);
  return row;
}

// What positions add to the loss, before the sample's weight, and to the denominator of its mean.
template <class Acc>
struct LossSums {
  Acc loss;
  Acc denominator;
};

template <class Acc>
__device__ __forceinline__ LossSums<Acc> merge(const LossSums<Acc>& a, const LossSums<Acc>& b) {
  return {a.loss + b.loss, a.denominator + b.denominator};
}

template <class T, class Acc>
__device__ __forceinline__ LossSums<Acc> loss_of_row(const ScoreBatch<T, Acc>& b, const ScoreRow<Acc>& row, Acc log_sum,
                                                     const ClassTarget<Acc>& target) {
  if (is_probability(b.target_kind)) return {cross_entropy(row, log_sum), Acc(1)};
  if (target.ignored) return {Acc(0), Acc(0)};
  if (!target.valid) return {static_cast<Acc>(NAN), Acc(0)};
  Acc loss = (Acc(1) - b.label_smoothing) * target.weight * (log_sum - (target.score - row.max));
  if (b.label_smoothing != Acc(0)) loss += cross_entropy(row, log_sum);
  return {loss, target.weight};
}

}  // namespace biasloss
