// The moments of every sample of a batch on the CPU, split into pieces that threads take in any order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../math/moments.h"

namespace biasloss {

// The pieces have a fixed length and are merged in order: the result does not depend on the number of threads.
class FeatureMoments {
 public:
  explicit FeatureMoments(const torch::stable::Tensor& features);

  int64_t pieces() const { return samples_ * pieces_per_sample_; }
  int64_t activations() const { return samples_ * length_; }
  // Threads may take disjoint ranges of pieces at the same time.
  void compute(int64_t begin, int64_t end);
  // After all pieces are computed. In the precision of the op's variance: float32, or float64 for float64 features.
  double variance(int64_t sample) const;

 private:
  torch::stable::Tensor features_;  // every sample is one dense run
  int64_t samples_, length_, pieces_per_sample_;
  std::vector<Moments<double>> partial_;
};

}  // namespace biasloss
