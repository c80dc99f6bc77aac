// The data gradient, the gradient of the weight and the coefficients of the normalization before it, in one read of the
// gradient, y and x and in one launch. dy is staged; an input then finds all outputs that it has a part in around it,
// and the same values that make its gradient make the weight's.
#pragma once

#include <type_traits>

#include "finish.cuh"
#include "stage.cuh"

namespace biasloss {

// dy from the gradient at act(affine(y)); see biasloss_ext/ops/depthwise/op.py.
template <class T, class Acc>
struct OutputGradient {
  using Parameters = DepthwiseBackwardParameters<T, Acc>;
  struct Fetched {
    Vector<T> grad, y;
  };
  static constexpr unsigned kPairs = 3;  // (scale, shift), (a, b), (c, center)
  const Parameters& p;
  unsigned count;
  const T* grad;  // of the sample, from the vector's first channel on; so are the others
  const T* y;
  const Acc* pool_grad;

  __device__ __forceinline__ OutputGradient(const Parameters& parameters, int64_t sample, unsigned channel)
      : p(parameters), count(channels_left(p.grid, channel)), grad(p.grad), y(p.y), pool_grad(p.pool_grad) {
    const int64_t begin = sample_begin(sample, p.grid.staged_rows, p.grid.staged_columns, p.grid.channels) + channel;
    if (grad != nullptr) grad += begin;
    if (y != nullptr) y += begin;
    if (pool_grad != nullptr) pool_grad += sample * p.grid.channels + channel;
  }

  static __device__ __forceinline__ CoefficientPair<Acc> pair(const Parameters& p, unsigned channel, unsigned which) {
    const unsigned channels = p.grid.channels;
    if (which == 0)
      return {{channel_value(p.y_affine, 0, channel, channels, Acc(1)),
               channel_value(p.y_affine, 1, channel, channels, Acc(0))}};
    const unsigned row = 2 * (which - 1);
    return {{channel_value(p.y_coefficients, row, channel, channels, Acc(0)),
             channel_value(p.y_coefficients, row + 1, channel, channels, Acc(0))}};
  }

  __device__ __forceinline__ Fetched load(unsigned offset) const {
    Fetched fetched = {};
    if (grad != nullptr) fetched.grad = load_channels(grad + offset, count, p.grid.vectors);
    if (y != nullptr) fetched.y = load_channels(y + offset, count, p.grid.vectors);
    return fetched;
  }

  struct Plain {};  // dy is grad

  // Calls f(variant), for cell() to be compiled for each.
  template <class F>
  __device__ __forceinline__ void with_variant(F&& f) const {
    if (p.y == nullptr)
      f(Plain());
    else
      with_smoothness(p.y_gate, f);
  }

  template <unsigned channels>
  __device__ __forceinline__ void cell(Plain, const Fetched& fetched, unsigned first,
                                       const CoefficientPair<Acc> (&)[channels][kPairs], Acc (&dy)[channels]) const {
#pragma unroll
    for (unsigned c = 0; c < channels; ++c) dy[c] = fetched.grad.template get<Acc>(first + c);
  }

  template <class Smooth, unsigned channels>
  __device__ __forceinline__ void cell(Smooth, const Fetched& fetched, unsigned first,
                                       const CoefficientPair<Acc> (&pair)[channels][kPairs],
                                       Acc (&dy)[channels]) const {
    Acc u[channels];
#pragma unroll
    for (unsigned c = 0; c < channels; ++c) {
      dy[c] = fetched.grad.template get<Acc>(first + c);
      if (pool_grad != nullptr && first + c < count) dy[c] += pool_grad[first + c] * p.pool_share;
      u[c] = fetched.y.template get<Acc>(first + c) * pair[c][0].value[0] + pair[c][0].value[1];
    }
    multiply_by_derivative<Smooth::value>(p.y_gate, u, dy);
#pragma unroll
    for (unsigned c = 0; c < channels; ++c)
      dy[c] = pair[c][1].value[0] * dy[c] +
              pair[c][1].value[1] * (fetched.y.template get<Acc>(first + c) - pair[c][2].value[1]) +
              pair[c][2].value[0];
  }
};

// What a thread sums over the map, for its channels.
template <class Tiling>
struct BackwardSums {
  typename Tiling::Cell weight[Tiling::kTaps] = {}, gradient = {}, product = {};
};

// One item: every row of dy once. An output at (r, c) of the window reaches the input at (y, x) by the tap that lies
// between them, if there is one. `window` is where it begins in the ring.
template <class Tiling>
__device__ __forceinline__ void differentiate_item(SharedPointer<typename Tiling::Cell> shared,
                                                   const Ring<Tiling>& ring, unsigned window,
                                                   const typename Tiling::Cell (&weight)[Tiling::kTaps],
                                                   const typename Tiling::Cell (&h)[Tiling::kRows][Tiling::kColumns],
                                                   typename Tiling::Cell (&dh)[Tiling::kRows][Tiling::kColumns],
                                                   BackwardSums<Tiling>& sums) {
  using Window = typename Tiling::Window;
  constexpr int kRows = Tiling::kRows, kColumns = Tiling::kColumns, kKernel = Tiling::kKernel;
  constexpr int kPadding = kKernel / 2;
#pragma unroll
  for (int r = 0; r < Window::extent(kRows); ++r) {
    typename Tiling::Cell dy[Window::extent(kColumns)];
#pragma unroll
    for (int c = 0; c < Window::extent(kColumns); ++c) dy[c] = shared[window + c * ring.lanes];
    window = ring.below(window);
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
      const int tap_row = y + kPadding - (r - Window::kHalo) * Tiling::kStride;
      if (tap_row < 0 || tap_row >= kKernel) continue;
#pragma unroll
      for (int c = 0; c < Window::extent(kColumns); ++c)
#pragma unroll
        for (int x = 0; x < kColumns; ++x) {
          const int tap_column = x + kPadding - (c - Window::kHalo) * Tiling::kStride;
          if (tap_column < 0 || tap_column >= kKernel) continue;
          const int tap = tap_row * kKernel + tap_column;
#pragma unroll
          for (unsigned i = 0; i < Tiling::kChannels; ++i) {
            dh[y][x].value[i] += weight[tap].value[i] * dy[c].value[i];
            sums.weight[tap].value[i] += h[y][x].value[i] * dy[c].value[i];
          }
        }
    }
  }
}

template <class Tiling, class Parameters>
__device__ __forceinline__ void differentiate_tile(const Parameters& p, const Tile& tile, unsigned start,
                                                   SharedPointer<typename Tiling::Cell> shared,
                                                   BackwardSums<Tiling>& sums) {
  using T = typename Tiling::Element;
  using Acc = typename Tiling::Acc;
  using Cell = typename Tiling::Cell;
  using Window = typename Tiling::Window;
  constexpr unsigned kChannels = Tiling::kChannels, kRows = Tiling::kRows, kColumns = Tiling::kColumns;
  constexpr int kStride = Tiling::kStride;
  using Coordinate = std::conditional_t<kStride == 1, unsigned, int>;  // what is missing() lies before the map
  const TileGrid& grid = p.grid;
  const Lane<Tiling> lane(grid);
  if (!lane.works()) return;
  const unsigned items_across = grid.tile_columns / kColumns;
  const unsigned items = grid.tile_rows / kRows * items_across;
  const Ring<Tiling> ring(grid);
  Cell weight[Tiling::kTaps];
  read_weights<Tiling>(shared, lane, weight);
  Acc scale[kChannels], shift[kChannels], center[kChannels];
#pragma unroll
  for (unsigned i = 0; i < kChannels; ++i) {
    scale[i] = channel_value(p.affine, 0, lane.channel + i, grid.channels, Acc(1));
    shift[i] = channel_value(p.affine, 1, lane.channel + i, grid.channels, Acc(0));
    center[i] = channel_value(p.norm.mean, 0, lane.channel + i, grid.channels, Acc(0));
  }
  const int64_t begin = sample_begin(tile.sample, grid.rows, grid.columns, grid.channels) + lane.channel;
  for (unsigned item = lane.worker; item < items; item += lane.workers) {
    const unsigned row = item / items_across * kRows, column = item % items_across * kColumns;
    const unsigned top = tile.row + row - Window::missing(grid.row_shift);
    const unsigned left = tile.column + column - Window::missing(grid.column_shift);
    if (Coordinate(top) >= Coordinate(grid.rows) || Coordinate(left) >= Coordinate(grid.columns)) continue;
    const int64_t first = begin + Coordinate((top * grid.columns + left) * grid.channels);
    const unsigned rows_left = grid.rows - top, columns_left = grid.columns - left;
    const unsigned next = recomputed(grid.channels), below = grid.columns * next;
    const auto exists = [&](unsigned r, unsigned c) {
      if constexpr (kStride == 1)
        return r < rows_left && c < columns_left;
      else
        return top + r < grid.rows && left + c < grid.columns;
    };
    const auto for_each_pixel = [&](auto&& use) {
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r)
#pragma unroll
        for (unsigned c = 0; c < kColumns; ++c)
          if (exists(r, c)) use(r, c);
    };
    T loaded[kRows][kColumns][kChannels] = {};
    Cell h[kRows][kColumns], dh[kRows][kColumns] = {};
    for_each_pixel([&](unsigned r, unsigned c) {
      load_values<kChannels>(p.x + first + r * below + c * next, lane.count, grid.vectors, loaded[r][c]);
    });
    const auto normalize = [&](unsigned r, unsigned c, Acc(&u)[kChannels]) {
#pragma unroll
      for (unsigned i = 0; i < kChannels; ++i) u[i] = static_cast<Acc>(loaded[r][c][i]) * scale[i] + shift[i];
    };
    with_smoothness(p.gate, [&](auto smooth) {
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r)
#pragma unroll
        for (unsigned c = 0; c < kColumns; ++c) {
          normalize(r, c, h[r][c].value);
          activate<decltype(smooth)::value>(p.gate, h[r][c].value);
#pragma unroll
          for (unsigned i = 0; i < kChannels; ++i) h[r][c].value[i] = exists(r, c) ? h[r][c].value[i] : Acc(0);
        }
    });
    differentiate_item<Tiling>(shared, ring,
                               ring.at(start, Window::scaled(int(row)), Window::scaled(int(column))) + lane.index,
                               weight, h, dh, sums);
    with_smoothness(p.gate, [&](auto smooth) {
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r)
#pragma unroll
        for (unsigned c = 0; c < kColumns; ++c) {
          Acc u[kChannels];
          normalize(r, c, u);
          multiply_by_derivative<decltype(smooth)::value>(p.gate, u, dh[r][c].value);
        }
    });
    if (p.residual_grad != nullptr)  // no norm, hence no sums of du
      for_each_pixel([&](unsigned r, unsigned c) {
        T residual[kChannels];
        load_values<kChannels>(p.residual_grad + first + r * below + c * next, lane.count, grid.vectors, residual);
#pragma unroll
        for (unsigned i = 0; i < kChannels; ++i) dh[r][c].value[i] += static_cast<Acc>(residual[i]);
      });
    for_each_pixel([&](unsigned r, unsigned c) {
      T stored[kChannels];
#pragma unroll
      for (unsigned i = 0; i < kChannels; ++i) {
        const Acc du = dh[r][c].value[i];
        sums.gradient.value[i] += du;
        sums.product.value[i] += du * (static_cast<Acc>(loaded[r][c][i]) - center[i]);
        stored[i] = static_cast<T>(du);
      }
      if (p.grad_x != nullptr)
        store_values<kChannels>(p.grad_x + first + r * below + c * next, lane.count, grid.vectors, stored);
    });
  }
}

// Adds up the workers. Calls sink(row, lane, total) for the rows of taps; sum(du) and sum(du * (y - mean)) are `both`
// of the first worker then.
template <class Tiling, class Sink>
__device__ __forceinline__ void add_workers(const Lane<Tiling>& lane, SharedPointer<typename Tiling::Cell> shared,
                                            const BackwardSums<Tiling>& sums, typename Tiling::Cell (&both)[2],
                                            Sink&& sink) {
  constexpr unsigned kKernel = Tiling::kKernel;
#pragma unroll
  for (unsigned row = 0; row < kKernel; ++row) {
    typename Tiling::Cell taps[kKernel];
#pragma unroll
    for (unsigned column = 0; column < kKernel; ++column) taps[column] = sums.weight[row * kKernel + column];
    add_workers<Tiling>(lane, shared, taps, [&](unsigned column, unsigned index, const typename Tiling::Cell& total) {
      sink(row * kKernel + column, index, total);
    });
  }
  both[0] = sums.gradient;
  both[1] = sums.product;
  const unsigned part = lane.workers * lane.lanes;
  if (lane.worker < lane.workers && lane.worker != 0) {
    shared[threadIdx.x] = both[0];
    shared[part + threadIdx.x] = both[1];
  }
  __syncthreads();
  if (lane.worker == 0)
    for (unsigned worker = 1; worker < lane.workers; ++worker)
#pragma unroll
      for (unsigned r = 0; r < 2; ++r) {
        const typename Tiling::Cell next = shared[r * part + worker * lane.lanes + lane.index];
#pragma unroll
        for (unsigned c = 0; c < Tiling::kChannels; ++c) both[r].value[c] += next.value[c];
      }
  __syncthreads();
}

template <class Tiling, class Parameters>
__device__ __forceinline__ void write_sums(const Parameters& p, SharedPointer<typename Tiling::Cell> shared,
                                           const BackwardSums<Tiling>& sums) {
  using Cell = typename Tiling::Cell;
  const Lane<Tiling> lane(p.grid);
  const PartialRows<Tiling, Tiling::kTaps + 2> partial(p.partial, lane.lanes, blockIdx.x, blockIdx.y);
  Cell both[2];
  add_workers<Tiling>(lane, shared, sums, both,
                      [&](unsigned row, unsigned index, const Cell& total) { partial.store(row, index, total); });
  if (lane.worker != 0) return;
  partial.store(Tiling::kTaps, lane.index, both[0]);
  partial.store(Tiling::kTaps + 1, lane.index, both[1]);
}

// Adds up the blocks of a slab, and finishes the gradients of its channels.
template <class Tiling, class Parameters>
__device__ __forceinline__ void finish_sums(const Parameters& p, SharedPointer<typename Tiling::Cell> shared,
                                            unsigned slab) {
  using Cell = typename Tiling::Cell;
  constexpr unsigned kChannels = Tiling::kChannels;
  const Lane<Tiling> lane(p.grid, slab);
  BackwardSums<Tiling> sums;
  for (unsigned block = lane.worker; lane.worker < lane.workers && block < gridDim.y; block += lane.workers) {
    const PartialRows<Tiling, Tiling::kTaps + 2> partial(p.partial, lane.lanes, slab, block);
    const auto add = [&](Cell& sum, unsigned row) {
      const Cell next = partial.load(row, lane.index);
#pragma unroll
      for (unsigned c = 0; c < kChannels; ++c) sum.value[c] += next.value[c];
    };
#pragma unroll
    for (unsigned tap = 0; tap < Tiling::kTaps; ++tap) add(sums.weight[tap], tap);
    add(sums.gradient, Tiling::kTaps);
    add(sums.product, Tiling::kTaps + 1);
  }
  Cell both[2];
  add_workers<Tiling>(lane, shared, sums, both, [&](unsigned tap, unsigned index, const Cell& total) {
    if (p.grad_weight == nullptr) return;
    const unsigned channel = Lane<Tiling>::channel_of(p.grid, index, slab);
#pragma unroll
    for (unsigned c = 0; c < kChannels; ++c)
      if (channel + c < p.grid.channels) p.grad_weight[int64_t(channel + c) * Tiling::kTaps + tap] = total.value[c];
  });
  if (lane.worker != 0 || p.norm.coefficients == nullptr) return;
#pragma unroll
  for (unsigned c = 0; c < kChannels; ++c)
    if (c < lane.count) finish_channel(p.norm, lane.channel + c, p.grid.channels, both[0].value[c], both[1].value[c]);
}

template <class T, class Acc, int kernel, int stride>
__global__ void __launch_bounds__(kDepthwiseThreads, backward_blocks<T>(kernel))
    depthwise_backward_kernel(const DepthwiseBackwardParameters<T, Acc> p) {
  using Tiling = BackwardTiling<T, Acc, kernel, stride>;
  using Cell = typename Tiling::Cell;
  using Source = OutputGradient<T, Acc>;
  BIASLOSS_SHARED(CoefficientPair<Acc>, coefficients, kCoefficients<Source>);
  BIASLOSS_DYNAMIC_SHARED(Cell, shared);
  BackwardSums<Tiling> sums;
  stage_weights<Tiling>(p.grid, p.weight, shared);
  stage_coefficients<Tiling, Source>(p, coefficients);
  clear_ring<Tiling>(p.grid, shared);
  __syncthreads();
  for_each_tile<Tiling, Source>(p, coefficients, shared, [&](const Tile& tile, unsigned start) {
    differentiate_tile<Tiling>(p, tile, start, shared, sums);
  });
  if (p.partial == nullptr) return;
  write_sums<Tiling>(p, shared, sums);
  finish_slabs(p.ticket_slot, [&](unsigned slab) { finish_sums<Tiling>(p, shared, slab); });
}

}  // namespace biasloss
