// The moments of a run of activations, in each instruction set.
#pragma once

#include <cstdint>

#include "../math/moments.h"
#include "../simd/isa.h"

namespace biasloss {

struct Float16;
struct BFloat16;

struct MomentsTable {
  Moments<double> (*of_float32)(const float*, int64_t);
  Moments<double> (*of_float64)(const double*, int64_t);
  Moments<double> (*of_float16)(const Float16*, int64_t);
  Moments<double> (*of_bfloat16)(const BFloat16*, int64_t);
};

BIASLOSS_TABLE_FOR_THIS_CPU(MomentsTable, moments_table, moments_table)

}  // namespace biasloss
