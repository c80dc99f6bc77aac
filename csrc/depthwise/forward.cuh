// y = conv(act(affine(x))), and the statistics of y, in one read of x and one launch.
#pragma once

#include "../math/moments.h"
#include "finish.cuh"
#include "stage.cuh"

namespace biasloss {

// h = act(affine(x))
template <class T, class Acc>
struct NormalizedInput {
  using Parameters = DepthwiseForwardParameters<T, Acc>;
  using Fetched = Vector<T>;
  static constexpr unsigned kPairs = 1;  // (scale, shift)
  const Parameters& p;
  unsigned count;
  const T* x;

  __device__ __forceinline__ NormalizedInput(const Parameters& parameters, int64_t sample, unsigned channel)
      : p(parameters),
        count(channels_left(p.grid, channel)),
        x(p.x + sample_begin(sample, p.grid.staged_rows, p.grid.staged_columns, p.grid.channels) + channel) {}

  static __device__ __forceinline__ CoefficientPair<Acc> pair(const Parameters& p, unsigned channel, unsigned) {
    return {{channel_value(p.affine, 0, channel, p.grid.channels, Acc(1)),
             channel_value(p.affine, 1, channel, p.grid.channels, Acc(0))}};
  }

  __device__ __forceinline__ Fetched load(unsigned offset) const {
    return load_channels(x + offset, count, p.grid.vectors);
  }

  // Calls f(variant), for cell() to be compiled for each.
  template <class F>
  __device__ __forceinline__ void with_variant(F&& f) const {
    with_smoothness(p.gate, f);
  }

  template <class Smooth, unsigned channels>
  __device__ __forceinline__ void cell(Smooth, const Fetched& fetched, unsigned first,
                                       const CoefficientPair<Acc> (&pair)[channels][kPairs], Acc (&h)[channels]) const {
#pragma unroll
    for (unsigned c = 0; c < channels; ++c)
      h[c] = fetched.template get<Acc>(first + c) * pair[c][0].value[0] + pair[c][0].value[1];
    activate<Smooth::value>(p.gate, h);
  }
};

// Of a thread's channels, about the first value of each.
template <class Acc, unsigned channels>
struct RunningMoments {
  unsigned count = 0;
  Acc shift[channels] = {}, sum[channels] = {}, sum_of_squares[channels] = {};

  // Before the values of an item, of which this is one.
  template <class T>
  __device__ __forceinline__ void start(const T (&value)[channels]) {
    if (count != 0) return;
#pragma unroll
    for (unsigned c = 0; c < channels; ++c) shift[c] = static_cast<Acc>(value[c]);
  }

  template <class T>
  __device__ __forceinline__ void push(const T (&value)[channels]) {
#pragma unroll
    for (unsigned c = 0; c < channels; ++c) {
      const Acc deviation = static_cast<Acc>(value[c]) - shift[c];
      sum[c] += deviation;
      sum_of_squares[c] += deviation * deviation;
    }
    ++count;
  }

  __device__ __forceinline__ Moments<Acc> moments(unsigned c) const {
    return moments_from_shifted_sums(static_cast<Acc>(count), shift[c], sum[c], sum_of_squares[c]);
  }
};

// One item: every row of the window once, into all rows of outputs that it has a part in. `window` is where it begins
// in the ring.
template <class Tiling>
__device__ __forceinline__ void convolve_item(SharedPointer<typename Tiling::Cell> shared, const Ring<Tiling>& ring,
                                              unsigned window, const typename Tiling::Cell (&weight)[Tiling::kTaps],
                                              typename Tiling::Cell (&sum)[Tiling::kRows][Tiling::kColumns]) {
  using Window = typename Tiling::Window;
  constexpr int kRows = Tiling::kRows, kColumns = Tiling::kColumns, kKernel = Tiling::kKernel;
  constexpr int kStride = Tiling::kStride;
#pragma unroll
  for (int r = 0; r < Window::extent(kRows); ++r) {
    typename Tiling::Cell input[Window::extent(kColumns)];
#pragma unroll
    for (int c = 0; c < Window::extent(kColumns); ++c) input[c] = shared[window + c * ring.lanes];
    window = ring.below(window);
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
      const int tap_row = r - y * kStride;
      if (tap_row < 0 || tap_row >= kKernel) continue;
#pragma unroll
      for (int tap = 0; tap < kKernel; ++tap)
#pragma unroll
        for (int x = 0; x < kColumns; ++x)
#pragma unroll
          for (unsigned c = 0; c < Tiling::kChannels; ++c)
            sum[y][x].value[c] += weight[tap_row * kKernel + tap].value[c] * input[x * kStride + tap].value[c];
    }
  }
}

template <class Tiling, class Parameters, class Running>
__device__ __forceinline__ void convolve_tile(const Parameters& p, const Tile& tile, unsigned start,
                                              SharedPointer<typename Tiling::Cell> shared, Running& moments) {
  using T = typename Tiling::Element;
  using Window = typename Tiling::Window;
  constexpr unsigned kChannels = Tiling::kChannels;
  const Lane<Tiling> lane(p.grid);
  if (!lane.works()) return;
  const unsigned items_across = p.grid.tile_columns / Tiling::kColumns;
  const unsigned items = p.grid.tile_rows / Tiling::kRows * items_across;
  const Ring<Tiling> ring(p.grid);
  typename Tiling::Cell weight[Tiling::kTaps];
  read_weights<Tiling>(shared, lane, weight);
  T* map = p.y + sample_begin(tile.sample, p.grid.rows, p.grid.columns, p.grid.channels) + lane.channel;
  for (unsigned item = lane.worker; item < items; item += lane.workers) {
    const unsigned row = item / items_across * Tiling::kRows, column = item % items_across * Tiling::kColumns;
    if (tile.row + row >= p.grid.rows || tile.column + column >= p.grid.columns) continue;
    typename Tiling::Cell sum[Tiling::kRows][Tiling::kColumns] = {};
    convolve_item<Tiling>(
        shared, ring, ring.at(start, Window::scaled(int(row)), Window::scaled(int(column))) + lane.index, weight, sum);
    const unsigned rows_left = p.grid.rows - (tile.row + row);
    const unsigned columns_left = p.grid.columns - (tile.column + column);
    T* y = map + ((tile.row + row) * p.grid.columns + tile.column + column) * p.grid.channels;
    const unsigned next = recomputed(p.grid.channels), below = p.grid.columns * next;
#pragma unroll
    for (unsigned r = 0; r < Tiling::kRows; ++r) {
#pragma unroll
      for (unsigned c = 0; c < Tiling::kColumns; ++c) {
        if (r >= rows_left || c >= columns_left) continue;
        T stored[kChannels];
#pragma unroll
        for (unsigned i = 0; i < kChannels; ++i) stored[i] = static_cast<T>(sum[r][c].value[i]);
        store_values<kChannels>(y + r * below + c * next, lane.count, p.grid.vectors, stored);
        if (r == 0 && c == 0) moments.start(stored);
        moments.push(stored);
      }
    }
  }
}

constexpr unsigned kRowsOfMoments = 3;

// Merges the workers in order; only the first has the result. Shared memory is in use until the next barrier.
template <class Tiling>
__device__ __forceinline__ void merge_workers(const Lane<Tiling>& lane, SharedPointer<typename Tiling::Cell> shared,
                                              Moments<typename Tiling::Acc> (&moments)[Tiling::kChannels]) {
  constexpr unsigned kChannels = Tiling::kChannels;
  const unsigned part = lane.workers * lane.lanes;
  if (lane.worker < lane.workers && lane.worker != 0) {
    typename Tiling::Cell count, mean, m2;
#pragma unroll
    for (unsigned c = 0; c < kChannels; ++c) {
      count.value[c] = moments[c].count;
      mean.value[c] = moments[c].mean;
      m2.value[c] = moments[c].m2;
    }
    shared[threadIdx.x] = count;
    shared[part + threadIdx.x] = mean;
    shared[2 * part + threadIdx.x] = m2;
  }
  __syncthreads();
  if (lane.worker != 0) return;
  for (unsigned worker = 1; worker < lane.workers; ++worker) {
    const unsigned cell = worker * lane.lanes + lane.index;
    const typename Tiling::Cell count = shared[cell], mean = shared[part + cell], m2 = shared[2 * part + cell];
#pragma unroll
    for (unsigned c = 0; c < kChannels; ++c)
      moments[c] = merge(moments[c], {count.value[c], mean.value[c], m2.value[c]});
  }
}

template <class Tiling, class Parameters, class Running>
__device__ __forceinline__ void write_moments(const Parameters& p, SharedPointer<typename Tiling::Cell> shared,
                                              const Running& running) {
  const Lane<Tiling> lane(p.grid);
  Moments<typename Tiling::Acc> moments[Tiling::kChannels];
#pragma unroll
  for (unsigned c = 0; c < Tiling::kChannels; ++c) moments[c] = running.moments(c);
  merge_workers<Tiling>(lane, shared, moments);
  if (lane.worker != 0) return;
  typename Tiling::Cell count, mean, m2;
#pragma unroll
  for (unsigned c = 0; c < Tiling::kChannels; ++c) {
    count.value[c] = moments[c].count;
    mean.value[c] = moments[c].mean;
    m2.value[c] = moments[c].m2;
  }
  const PartialRows<Tiling, kRowsOfMoments> partial(p.partial, lane.lanes, blockIdx.x, blockIdx.y);
  partial.store(0, lane.index, count);
  partial.store(1, lane.index, mean);
  partial.store(2, lane.index, m2);
}

// Merges the blocks of a slab, and finishes the normalization of its channels.
template <class Tiling, class Parameters>
__device__ __forceinline__ void finish_moments(const Parameters& p, SharedPointer<typename Tiling::Cell> shared,
                                               unsigned slab) {
  using Acc = typename Tiling::Acc;
  using Cell = typename Tiling::Cell;
  const Lane<Tiling> lane(p.grid, slab);
  Moments<Acc> moments[Tiling::kChannels] = {};
  for (unsigned block = lane.worker; lane.worker < lane.workers && block < gridDim.y; block += lane.workers) {
    const PartialRows<Tiling, kRowsOfMoments> partial(p.partial, lane.lanes, slab, block);
    const Cell count = partial.load(0, lane.index), mean = partial.load(1, lane.index),
               m2 = partial.load(2, lane.index);
#pragma unroll
    for (unsigned c = 0; c < Tiling::kChannels; ++c)
      moments[c] = merge(moments[c], {count.value[c], mean.value[c], m2.value[c]});
  }
  merge_workers<Tiling>(lane, shared, moments);
  if (lane.worker == 0)
#pragma unroll
    for (unsigned c = 0; c < Tiling::kChannels; ++c)
      if (c < lane.count) finish_channel(p.norm, lane.channel + c, p.grid.channels, moments[c]);
  __syncthreads();
}

template <class T, class Acc, int kernel, int stride>
__global__ void __launch_bounds__(kDepthwiseThreads, forward_blocks<T>(kernel))
    depthwise_forward_kernel(const DepthwiseForwardParameters<T, Acc> p) {
  using Tiling = ForwardTiling<T, Acc, kernel, stride>;
  using Source = NormalizedInput<T, Acc>;
  BIASLOSS_SHARED(CoefficientPair<Acc>, coefficients, kCoefficients<Source>);
  BIASLOSS_DYNAMIC_SHARED(typename Tiling::Cell, shared);
  RunningMoments<Acc, Tiling::kChannels> moments;
  stage_weights<Tiling>(p.grid, p.weight, shared);
  stage_coefficients<Tiling, Source>(p, coefficients);
  clear_ring<Tiling>(p.grid, shared);
  __syncthreads();
  for_each_tile<Tiling, Source>(p, coefficients, shared, [&](const Tile& tile, unsigned start) {
    convolve_tile<Tiling>(p, tile, start, shared, moments);
  });
  if (p.partial == nullptr) return;
  write_moments<Tiling>(p, shared, moments);
  finish_slabs(p.ticket_slot, [&](unsigned slab) {
    if (slab == 0 && threadIdx.x == 0 && p.norm.num_batches_tracked != nullptr) ++*p.norm.num_batches_tracked;
    finish_moments<Tiling>(p, shared, slab);
  });
}

}  // namespace biasloss
