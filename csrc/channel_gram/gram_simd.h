// Sums of products of channels over a run of pixels, in each instruction set.
#pragma once

#include <cstdint>

#include "../simd/isa.h"
#include "../simd/types.h"

namespace biasloss {

// For rows of x: mean (channels,) and gram (channels, channels) in rows of gram_stride, both about a pivot that lies
// near the data; see csrc/channel_gram/cpu.cpp. On and above the diagonal: what is below is not defined.
template <class Element, class Scalar>
using GramRows = void (*)(const Element* x, int64_t rows, int64_t channels, void* scratch, Scalar* pivot, Scalar* sum,
                          Scalar* gram, int64_t gram_stride);

struct GramTable {
  int64_t (*scratch_bytes)(int64_t channels, int64_t scalar_bytes);
  GramRows<float, float> of_float32;
  GramRows<double, double> of_float64;
  GramRows<Float16, float> of_float16;
  GramRows<BFloat16, float> of_bfloat16;

  auto of(float) const { return of_float32; }
  auto of(double) const { return of_float64; }
  auto of(Float16) const { return of_float16; }
  auto of(BFloat16) const { return of_bfloat16; }
};

BIASLOSS_TABLE_FOR_THIS_CPU(GramTable, gram_table, gram_table)

}  // namespace biasloss
