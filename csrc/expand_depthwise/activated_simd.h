// One row of a depthwise convolution of strips, normalized and activated as it leaves, in each instruction set.
#pragma once

#include "../depthwise/rows_simd.h"
#include "../simd/per_element.h"

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

template <class T>
using ActivatedKernelsOf = ActivatedKernels<T, AccumulatorOf<T>>;
using ActivatedTables = PerElement<ActivatedKernelsOf>;

BIASLOSS_TABLE_FOR_THIS_CPU(ActivatedTables, activated_tables, activated_tables)

}  // namespace biasloss
