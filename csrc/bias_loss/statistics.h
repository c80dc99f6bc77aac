// What the forward pass leaves to the backward pass, in one tensor of 1 + 2 x rows: an allocation and an argument cost
// more than many a batch of scores.
#pragma once

#include <cstdint>

namespace biasloss {

inline int64_t count_of_statistics(int64_t rows) { return 1 + 2 * rows; }

template <class Scalar>  // const or not
struct Statistics {
  Statistics(Scalar* data, int64_t rows) : denominator(data), row_max(data + 1), row_log_sum(data + 1 + rows) {}
  Scalar* denominator;  // of the mean; 1 for other reductions
  Scalar* row_max;
  Scalar* row_log_sum;  // log of the sum of exp(score - maximum)
};

}  // namespace biasloss
