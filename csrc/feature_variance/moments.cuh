// Moments of a slice of one sample: the feature stream, which sets the speed of the whole loss.
#pragma once

#include "../cuda/vector_load.cuh"
#include "../math/moments.h"
#include "parameters.h"

namespace biasloss {

constexpr unsigned kVectorsInFlight = 4;

// Two moments about the first value this thread saw: near enough to the mean that nothing cancels, and free.
template <class Acc>
struct ShiftedSums {
  Acc shift = 0;
  Acc sum = 0;
  Acc sum_of_squares = 0;
  unsigned count = 0;

  __device__ __forceinline__ void start_at(Acc value) {
    if (count == 0) shift = value;
  }

  __device__ __forceinline__ void push(Acc value) {
    start_at(value);
    const Acc deviation = value - shift;
    sum += deviation;
    sum_of_squares += deviation * deviation;
    ++count;
  }

  // A vector's own sums first: shorter chains of additions, for speed and for rounding.
  template <class T>
  __device__ __forceinline__ void push(const Vector<T>& vector) {
    start_at(vector.template get<Acc>(0));
    Acc s = 0, q = 0;
#pragma unroll
    for (unsigned i = 0; i < Vector<T>::kSize; ++i) {
      const Acc deviation = vector.template get<Acc>(i) - shift;
      s += deviation;
      q += deviation * deviation;
    }
    sum += s;
    sum_of_squares += q;
    count += Vector<T>::kSize;
  }

  // With the mean relative to `origin`.
  __device__ __forceinline__ Moments<Acc> moments(Acc origin) const {
    return moments_from_shifted_sums(static_cast<Acc>(count), shift - origin, sum, sum_of_squares);
  }
};

// One thread's share of a dense run, read by `threads` threads together.
template <class T, class Acc>
__device__ __forceinline__ Moments<Acc> moments_of_run(const T* run, unsigned count, Acc origin, unsigned thread,
                                                       unsigned threads) {
  const AlignedRun aligned = aligned_run(run, count);
  const T* body = run + aligned.head;
  ShiftedSums<Acc> sums;
  unsigned v = thread;
  for (; v + (kVectorsInFlight - 1) * threads < aligned.vectors; v += kVectorsInFlight * threads) {
    Vector<T> vector[kVectorsInFlight];
#pragma unroll
    for (unsigned u = 0; u < kVectorsInFlight; ++u)
      vector[u] = load_vector(body + size_t(v + u * threads) * Vector<T>::kSize);
#pragma unroll
    for (unsigned u = 0; u < kVectorsInFlight; ++u) sums.push(vector[u]);
  }
  // At most kVectorsInFlight - 1 are left; their loads go out together as well.
  Vector<T> rest[kVectorsInFlight - 1];
#pragma unroll
  for (unsigned u = 0; u < kVectorsInFlight - 1; ++u)
    if (v + u * threads < aligned.vectors) rest[u] = load_vector(body + size_t(v + u * threads) * Vector<T>::kSize);
#pragma unroll
  for (unsigned u = 0; u < kVectorsInFlight - 1; ++u)
    if (v + u * threads < aligned.vectors) sums.push(rest[u]);
  if (thread < aligned.edges()) sums.push(static_cast<Acc>(run[aligned.edge(thread)]));
  return sums.moments(origin);
}

// Means are relative to the sample's first activation: merging the moments of threads, warps and slices squares the
// differences of their means, which must not be rounded to the precision of a mean that is large beside the spread.
template <class T, class Acc>
__device__ __forceinline__ Moments<Acc> moments_of_slice(const FeatureBatch<T>& features, int64_t sample,
                                                         unsigned split) {
  const int64_t begin = features.slice * split;
  const int64_t left = features.activations - begin;
  const int64_t count = left < features.slice ? left : features.slice;
  if (count <= 0) return {Acc(0), Acc(0), Acc(0)};
  const T* first = features.data + sample * features.sample_stride;
  const Acc origin = static_cast<Acc>(*first);
  return moments_of_run<T, Acc>(first + begin, static_cast<unsigned>(count), origin, threadIdx.x, kFeatureThreads);
}

// Partial results of all blocks, as three arrays: written by one block each, read by the last one past the L1 cache.
template <class Acc>
__device__ __forceinline__ void write_moments(Acc* partial, int64_t blocks, int64_t block, const Moments<Acc>& m) {
  partial[block] = m.count;
  partial[blocks + block] = m.mean;
  partial[2 * blocks + block] = m.m2;
}

template <class Acc>
__device__ __forceinline__ Moments<Acc> read_moments(const Acc* partial, int64_t blocks, int64_t block) {
  return {__ldcg(partial + block), __ldcg(partial + blocks + block), __ldcg(partial + 2 * blocks + block)};
}

}  // namespace biasloss
