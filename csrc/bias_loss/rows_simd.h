// Softmax cross-entropy of one row of scores, contiguous and already in the type it is computed in, in each instruction
// set. log p = (x - max) - log_sum throughout: more exact than x - log_sum_exp where scores are large.
#pragma once

#include <cstdint>

#include "../simd/isa.h"
#include "../simd/per_element.h"

namespace biasloss {

template <class Scalar>
struct RowTable {
  void (*max_and_log_sum)(const Scalar* x, int64_t classes, Scalar* max, Scalar* log_sum);
  // -sum_k q_k log p_k
  Scalar (*soft_loss)(const Scalar* x, const Scalar* q, int64_t classes, Scalar max, Scalar log_sum);
  // gradient_k = scale p_k; the caller mends the target's
  void (*hard_gradient)(const Scalar* x, int64_t classes, Scalar max, Scalar log_sum, Scalar scale, Scalar* gradient);
  // gradient_k = scale (total p_k - q_k)
  void (*soft_gradient)(const Scalar* x, const Scalar* q, int64_t classes, Scalar max, Scalar log_sum, Scalar scale,
                        Scalar total, Scalar* gradient);
};

struct RowTables : PerScalar<RowTable> {
  void (*widen_float16)(const Float16* from, int64_t stride, int64_t count, float* to);
  void (*widen_bfloat16)(const BFloat16* from, int64_t stride, int64_t count, float* to);
  void (*narrow_float16)(const float* from, int64_t count, Float16* to, int64_t stride);
  void (*narrow_bfloat16)(const float* from, int64_t count, BFloat16* to, int64_t stride);
};

BIASLOSS_TABLE_FOR_THIS_CPU(RowTables, row_tables, row_tables)

}  // namespace biasloss
