// What the CUDA kernels of the depthwise convolution are told, and what they are made for. No torch, no CUDA runtime.
//
// Every kernel computes one map from windows of another: y from windows of h (forward), the gradient at h from windows
// of dy (backward). A block marches down strips of the other map: it stages the window of a tile in shared memory, in
// accumulation precision, and computes the tile; a slab is the channels that it works on. A thread computes items: a
// few rows and columns of a few channels, the same channels all along, so that weights and sums over the map stay in
// its registers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gate.cuh"
#include "norm.cuh"

namespace biasloss {

constexpr unsigned kDepthwiseThreads = 256;
constexpr unsigned kWidestSlab = kDepthwiseThreads / 2;  // channels

// Adjacent channels: what shared memory holds.
template <class Acc, unsigned channels>
struct alignas(sizeof(Acc) * channels) Channels {
  Acc value[channels];
};

// Where the windows of outputs lie in the input: the outputs from o on need inputs from scaled(o) - halo() on. With a
// shift, which only stride 2 has, they lie one input later: see window_shift.h.
template <int kernel, int stride>
struct InputWindow {
  static constexpr int kHalo = kernel / 2;
  BIASLOSS_HOST_DEVICE static constexpr int halo(unsigned shift) { return stride == 1 ? kHalo : kHalo - int(shift); }
  BIASLOSS_HOST_DEVICE static constexpr unsigned missing(unsigned) { return 0; }
  static constexpr int kProducts = kernel * kernel;  // a computed value and channel
  BIASLOSS_HOST_DEVICE static constexpr int scaled(int output) { return output * stride; }
  BIASLOSS_HOST_DEVICE static constexpr int extent(int outputs) { return (outputs - 1) * stride + kernel; }
  // The most outputs that so many inputs serve.
  BIASLOSS_HOST_DEVICE static constexpr int largest(int inputs) {
    return inputs < kernel ? 0 : (inputs - kernel) / stride + 1;
  }
};

// Where the outputs lie that inputs have a part in. The first input and the number of inputs are multiples of the
// stride: with stride 2 the parity of an input, and so the taps that reach it, are known when the kernel is compiled.
// With a shift they would be others: tiles begin one input before the map instead, which is missing() there, and the
// window one output earlier.
template <int kernel, int stride>
struct OutputWindow {
  static constexpr int kHalo = kernel / 2 / stride;
  BIASLOSS_HOST_DEVICE static constexpr int halo(unsigned shift) { return stride == 1 ? kHalo : kHalo + int(shift); }
  BIASLOSS_HOST_DEVICE static constexpr unsigned missing(unsigned shift) { return stride == 1 ? 0 : shift; }
  static constexpr int kProducts = 2 * kernel * kernel / (stride * stride);
  BIASLOSS_HOST_DEVICE static constexpr int scaled(int input) { return input / stride; }
  BIASLOSS_HOST_DEVICE static constexpr int extent(int inputs) { return inputs / stride + kernel / 2 * 2 / stride; }
  BIASLOSS_HOST_DEVICE static constexpr int largest(int outputs) {
    const int less = outputs - kernel / 2 * 2 / stride;
    return less < 0 ? 0 : less * stride;
  }
};

// Registers decide: taps times channels weights, as many sums of the weight gradient, and the item itself.
template <class T, class Acc_, int kernel_, int stride_, class Window_, unsigned rows, unsigned columns,
          unsigned blocks>
struct DepthwiseTiling {
  using Element = T;
  using Acc = Acc_;
  using Window = Window_;
  static constexpr int kKernel = kernel_, kStride = stride_, kTaps = kernel_ * kernel_;
  static constexpr bool kDouble = sizeof(T) == 8;  // plain: there for exactness
  static constexpr unsigned kVector = 16 / sizeof(T);
  static constexpr unsigned kChannels = kernel_ > 3 || kDouble ? 1 : 2;
  static constexpr unsigned kRows = kDouble ? 2 : rows;
  static constexpr unsigned kColumns = kDouble ? 2 : columns;
  static constexpr unsigned kBlocks = blocks;
  // Pixels that a thread loads while it computes a tile, and then at a time.
  static constexpr unsigned kInFlight = 2;
  using Cell = Channels<Acc, kChannels>;
};

// Blocks that a multiprocessor has room for, in registers: as many as there shall be.
template <class T>
constexpr unsigned forward_blocks(int kernel) {
  return sizeof(T) == 8 ? 1 : kernel == 7 ? 2 : 3;
}
template <class T>
constexpr unsigned backward_blocks(int kernel) {
  return sizeof(T) == 8 || kernel == 7 ? 1 : 2;
}

template <class T, class Acc, int kernel, int stride>
using ForwardTiling = DepthwiseTiling<T, Acc, kernel, stride, InputWindow<kernel, stride>, kernel == 7 ? 4 : 2, 4,
                                      forward_blocks<T>(kernel)>;

template <class T, class Acc, int kernel, int stride>
using BackwardTiling = DepthwiseTiling<T, Acc, kernel, stride, OutputWindow<kernel, stride>, stride,
                                       kernel == 3 && stride == 2 ? 2 : 4, backward_blocks<T>(kernel)>;

// A batch of maps cut into strips of tiles, and its channels into slabs. The x of a block is its slab, so that
// neighbors share lines of memory; its y says which tiles are its share.
struct TileGrid {
  unsigned tiles;  // of all samples
  unsigned channels;
  unsigned rows, columns;                // of the map that is computed
  unsigned staged_rows, staged_columns;  // of the map that is staged
  unsigned slab;                         // channels of one, a multiple of a vector
  unsigned tile_rows, tile_columns;      // computed by a block at a time, multiples of an item
  unsigned tiles_down, tiles_across;     // of one sample
  unsigned tiles_of_block;               // one after another, down the strips
  bool vectors;                          // whether 16-byte accesses are possible
  unsigned row_shift, column_shift;      // of the windows
};

template <class T, class Acc>
struct DepthwiseForwardParameters {
  TileGrid grid;
  const T* x;
  const Acc* weight;  // (C, k, k)
  const Acc* affine;  // (2, C) or null
  Gate<Acc> gate;
  T* y;
  Acc* partial;  // rows count, mean, m2, as in finish.cuh; null: no statistics
  unsigned ticket_slot;
  NormParameters<Acc> norm;
};

template <class T, class Acc>
struct DepthwiseBackwardParameters {
  TileGrid grid;
  const T* grad;              // null: zero
  const Acc* pool_grad;       // (N, C) or null
  Acc pool_share;             // 1 / (H' * W')
  const T* y;                 // null: dy is grad
  const Acc* y_affine;        // (2, C) or null
  const Acc* y_coefficients;  // (6, C), of which the first four rows count
  Gate<Acc> y_gate;
  const T* x;
  const Acc* weight;
  const Acc* affine;
  Gate<Acc> gate;
  const T* residual_grad;  // joins grad_x; null: zero
  T* grad_x;               // null: not wanted
  Acc* grad_weight;        // (C, k, k); null: not wanted
  Acc* partial;  // rows: gradient of the weight by taps, both sums of the norm, as in finish.cuh; null: none is wanted
  unsigned ticket_slot;
  NormGradientParameters<Acc> norm;
};

}  // namespace biasloss
