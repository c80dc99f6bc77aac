// One row of a depthwise convolution of strips, normalized and activated as it leaves, in each instruction set.
#pragma once

#include "../depthwise/rows_simd.h"

namespace biasloss {

// Where a row of h = act(affine(y)) goes; sums, where wanted, are those over its columns, a channel each.
template <class T, class Scalar>
struct ActivatedRow {
  MapRow<T> h;
  Affine<Scalar> affine;
  Scalar* sums;
};

template <class T, class Scalar>
struct ActivatedKernels {
  // [kernel is 3, 5, 7][stride is 1, 2]. The weights are packed.
  void (*convolve[3][2])(const Taps<Scalar>& taps, const Scalar* weight, RowSize size,
                         const ActivatedRow<T, Scalar>& to);
};

struct ActivatedTables {
  ActivatedKernels<float, float> float32;
  ActivatedKernels<double, double> float64;
  ActivatedKernels<Float16, float> float16;
  ActivatedKernels<BFloat16, float> bfloat16;

  const ActivatedKernels<float, float>& of(float) const { return float32; }
  const ActivatedKernels<double, double>& of(double) const { return float64; }
  const ActivatedKernels<Float16, float>& of(Float16) const { return float16; }
  const ActivatedKernels<BFloat16, float>& of(BFloat16) const { return bfloat16; }
};

BIASLOSS_TABLE_FOR_THIS_CPU(ActivatedTables, activated_tables, activated_tables)

}  // namespace biasloss
