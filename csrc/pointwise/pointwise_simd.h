// The passes over the rows (pixels) of 1x1 convolutions, in each instruction set.
#pragma once

#include <cstdint>

#include "../math/activations.h"
#include "../simd/isa.h"
#include "../simd/types.h"
#include "row_tiles.h"

namespace biasloss {

template <class Scalar>
struct PointwiseForward {
  RowTiles tiles;
  int64_t channels, outputs, positions;  // positions: rows of a sample
  const void* x;
  const Scalar* weight;  // (channels, outputs) in rows of weight_stride, which hold whole vectors
  int64_t weight_stride;
  bool by_vectors;              // instead of rows: see Layout in csrc/simd/gemm.h
  const Scalar *scale, *shift;  // or null, as all that follow
  const Scalar* gate;
  const Scalar* bias;
  const void* residual;
  Activation activation, output_activation;
  void* y;
  bool want_moments;
};

template <class Scalar>
struct PointwiseBackward {
  RowTiles tiles;
  int64_t channels, outputs, positions;
  const void* grad;
  const void* y;
  const Scalar* coefficients;  // (4, outputs), with y, or null
  const void* x;
  const Scalar* weight;  // (outputs, channels) in rows of weight_stride, which hold whole vectors
  int64_t weight_stride;
  const Scalar *scale, *shift, *center, *gate;
  const void* residual_grad;
  Activation activation;
  void* grad_x;
  bool want_weight;
  bool transposed;      // the parts of the weight's gradient are (channels, outputs)
  Scalar* weight_grad;  // a part a piece, in rows of weight_grad_stride
  int64_t weight_grad_stride;
  // kTerms rows of slot_stride: with a gate, for every part of a sample in a tile (the slot is the sum of both
  // numbers), else for every tile.
  Scalar* slots;
  int64_t slot_stride;
};

// What is summed over positions: the gradient of the gate, and the four sums of biasloss_ext/ops/pointwise/op.py.
// Without a gate, only the first and third of these, at their places.
constexpr int kTerms = 5, kSumOfGradient = 1, kSumOfProducts = 3;

template <class Scalar>
using ForwardPiece = void (*)(const PointwiseForward<Scalar>&, int64_t piece, int64_t first_output, int64_t outputs,
                              void* scratch, double* mean, double* m2);
template <class Scalar>
using BackwardPiece = void (*)(const PointwiseBackward<Scalar>&, int64_t piece, void* scratch);

// One function for every type of element, picked by a value of that type.
template <template <class> class Function>
struct ByElement {
  Function<float> float32;
  Function<double> float64;
  Function<float> float16, bfloat16;

  auto of(float) const { return float32; }
  auto of(double) const { return float64; }
  auto of(Float16) const { return float16; }
  auto of(BFloat16) const { return bfloat16; }
};

// Packs a weight into rows that hold whole vectors: see pack() in csrc/simd/gemm.h.
struct PackWeight {
  void (*float32)(int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
  void (*float64)(int64_t, int64_t, const double*, int64_t, int64_t, double*, int64_t);

  auto of(float) const { return float32; }
  auto of(double) const { return float64; }
};

struct PointwiseForwardTable {
  int64_t vector_bytes;
  PackWeight pack;
  int64_t (*scratch_bytes)(const RowTiles&, int64_t channels, int64_t outputs, int64_t scalar_bytes);
  ByElement<ForwardPiece> piece;
};
struct PointwiseBackwardTable {
  int64_t vector_bytes;
  PackWeight pack;
  int64_t (*scratch_bytes)(const RowTiles&, int64_t channels, int64_t outputs, int64_t scalar_bytes);
  ByElement<BackwardPiece> piece;
};

BIASLOSS_TABLE_FOR_THIS_CPU(PointwiseForwardTable, pointwise_forward, pointwise_forward_table)
BIASLOSS_TABLE_FOR_THIS_CPU(PointwiseBackwardTable, pointwise_backward, pointwise_backward_table)

}  // namespace biasloss
