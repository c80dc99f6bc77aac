// Softmax cross-entropy of many rows of scores at once, one row a lane: for few classes, which would leave most of a
// vector empty, and for classes that lie apart in memory.
#pragma once

#include <cstdint>

#include "../simd/isa.h"
#include "../simd/per_element.h"

namespace biasloss {

// Where a block of rows lies in memory.
struct RowBlock {
  int64_t rows, classes, row_stride, class_stride;
};

// What is known of the rows of a block. An ignored row has the label -1.
template <class Scalar>
struct LaneRows {
  Scalar max[64], log_sum[64], scale[64], total[64], loss[64];
  int32_t label[64];
};

// A block of scores is (classes, width), `rows` of each line in use. width is a multiple of 16, at most 64; the kernels
// compute whole vectors, whatever the lanes behind the rows hold.
template <class Scalar>
struct LaneTable {
  // Fills max and log_sum.
  void (*max_and_log_sum)(const Scalar* x, int64_t classes, int64_t width, int64_t rows, LaneRows<Scalar>* of);
  // loss = -log p of the label, 0 for an ignored row
  void (*hard_loss)(const Scalar* x, int64_t classes, int64_t width, int64_t rows, LaneRows<Scalar>* of);
  // loss = -sum_k q_k log p_k, 0 for an ignored row
  void (*soft_loss)(const Scalar* x, const Scalar* q, int64_t classes, int64_t width, int64_t rows,
                    LaneRows<Scalar>* of);
  // x becomes scale (p - [k == label]), 0 for an ignored row.
  void (*hard_gradient)(Scalar* x, int64_t classes, int64_t width, const LaneRows<Scalar>& of, int64_t rows);
  // x becomes scale (total p - q), 0 for an ignored row.
  void (*soft_gradient)(Scalar* x, const Scalar* q, int64_t classes, int64_t width, const LaneRows<Scalar>& of,
                        int64_t rows);
  // `spare` has room for a block.
  void (*load)(const Scalar* from, const RowBlock& block, Scalar* to, int64_t width, Scalar* spare);
  void (*store)(const Scalar* from, int64_t width, const RowBlock& block, Scalar* to, Scalar* spare);
  // Variances become weights.
  void (*weigh)(Scalar* weight, int64_t count, Scalar low, Scalar range, Scalar alpha, Scalar beta);
  double (*sum)(const Scalar* values, int64_t count);
};

struct LaneTables : PerScalar<LaneTable> {
  void (*load_float16)(const Float16* from, const RowBlock& block, float* to, int64_t width, float* spare);
  void (*load_bfloat16)(const BFloat16* from, const RowBlock& block, float* to, int64_t width, float* spare);
  void (*store_float16)(const float* from, int64_t width, const RowBlock& block, Float16* to, float* spare);
  void (*store_bfloat16)(const float* from, int64_t width, const RowBlock& block, BFloat16* to, float* spare);
  // The labels of rows of these classes, -1 for those that do not count, and how many count. False if a class is
  // neither ignored nor valid. Reads and writes up to a whole vector; what lies behind the rows must be ignored.
  bool (*labels)(const int64_t* classes_of_rows, int64_t count, int64_t classes, int64_t ignore_index, int32_t* label,
                 int64_t* counted);
};

BIASLOSS_TABLE_FOR_THIS_CPU(LaneTables, lane_tables, lane_tables)

}  // namespace biasloss
