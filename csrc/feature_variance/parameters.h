// What the kernels of the feature variance are told, and how a launch is laid out. No torch, no CUDA runtime.
#pragma once

#include <algorithm>
#include <cstdint>

namespace biasloss {

constexpr unsigned kFeatureThreads = 256;
// Above this a thread would add so many squares that float32 rounding shows in the variance.
constexpr int64_t kLargestSlice = int64_t(kFeatureThreads) * 4096;

// A batch of samples, each one dense run of activations, cut into slices of equal length.
template <class T>
struct FeatureBatch {
  const T* data;
  int64_t sample_stride;
  int64_t activations;  // of one sample
  int64_t slice;        // activations a block reads; a multiple of 16 bytes
};

template <class T, class Acc>
struct FeatureVarianceParameters {
  FeatureBatch<T> features;
  int64_t samples;
  unsigned splits;  // blocks a sample
  unsigned lanes_per_sample;
  unsigned ticket;
  Acc* partial;   // 3 x (samples * splits): count, mean, m2
  Acc* variance;  // (samples)
  Acc* extrema;   // (2)
};

// Two waves of blocks fill the device when there are few samples; a slice is never less than one 16-byte load a thread.
inline unsigned feature_splits(int64_t samples, int64_t activations, int64_t element_size, int multiprocessors) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t useful = std::max<int64_t>(1, activations * element_size / (kFeatureThreads * 16));
  const int64_t wanted = divide_up(2 * int64_t(multiprocessors), std::max<int64_t>(samples, 1));
  return static_cast<unsigned>(std::max(std::min(useful, wanted), divide_up(activations, kLargestSlice)));
}

inline int64_t slice_length(int64_t activations, unsigned splits, int64_t element_size) {
  const int64_t vector = 16 / element_size;
  const int64_t even = (activations + splits - 1) / splits;
  return (even + vector - 1) / vector * vector;
}

// The last block merges the slices of a sample with this many lanes.
inline unsigned lanes_for(unsigned splits) {
  unsigned lanes = 1;
  while (lanes < splits && lanes < 32) lanes *= 2;
  return lanes;
}

}  // namespace biasloss
