// The tile of a block: who does what, and how a map comes into shared memory.
#pragma once

#include "../cuda/vector_load.cuh"
#include "cuda_parameters.h"

namespace biasloss {

// `count` of n elements, the rest zeros; n of them in one access where they lie and number right (`together`).
template <unsigned n, class T, class Acc>
__device__ __forceinline__ void load_values(const T* p, unsigned count, bool together, Acc (&value)[n]) {
  struct alignas(sizeof(T) * n) Packed {
    T element[n];
  };
  if (together) {
    const Packed packed = *reinterpret_cast<const Packed*>(p);
#pragma unroll
    for (unsigned i = 0; i < n; ++i) value[i] = static_cast<Acc>(packed.element[i]);
    return;
  }
#pragma unroll
  for (unsigned i = 0; i < n; ++i) value[i] = i < count ? static_cast<Acc>(p[i]) : Acc(0);
}

template <unsigned n, class T>
__device__ __forceinline__ void store_values(T* p, unsigned count, bool together, const T (&value)[n]) {
  struct alignas(sizeof(T) * n) Packed {
    T element[n];
  };
  if (together) {
    Packed packed;
#pragma unroll
    for (unsigned i = 0; i < n; ++i) packed.element[i] = value[i];
    *reinterpret_cast<Packed*>(p) = packed;
    return;
  }
#pragma unroll
  for (unsigned i = 0; i < n; ++i)
    if (i < count) p[i] = value[i];
}

template <class T>
__device__ __forceinline__ Vector<T> load_channels(const T* p, unsigned count, bool vectors) {
  if (vectors) return load_vector(p);
  T element[Vector<T>::kSize];
#pragma unroll
  for (unsigned i = 0; i < Vector<T>::kSize; ++i) element[i] = i < count ? p[i] : static_cast<T>(0.0f);
  Vector<T> vector;
  std::memcpy(&vector.bits, element, kVectorBytes);
  return vector;
}

// The value of a channel in row `row` of (rows, C); `otherwise` where there is none.
template <class Acc>
__device__ __forceinline__ Acc channel_value(const Acc* rows, unsigned row, unsigned channel, unsigned channels,
                                             Acc otherwise) {
  return rows == nullptr || channel >= channels ? otherwise : rows[row * channels + channel];
}

__device__ __forceinline__ unsigned channels_left(const TileGrid& grid, unsigned channel) {
  return channel < grid.channels ? grid.channels - channel : 0;
}

// Samples are numbered in 64 bits, elements of one sample in 32: the launcher sees to that.
struct Tile {
  int64_t sample;
  unsigned row, column;  // of the computed map
};

// Where a sample's map of this size begins.
__device__ __forceinline__ int64_t sample_begin(int64_t sample, unsigned rows, unsigned columns, unsigned channels) {
  return sample * (int64_t(rows) * columns) * channels;
}

__device__ __forceinline__ Tile tile_at(const TileGrid& grid, unsigned index) {
  const unsigned strip = index / grid.tiles_across;
  return {strip / grid.tiles_down, strip % grid.tiles_down * grid.tile_rows,
          index % grid.tiles_across * grid.tile_columns};
}

// The part of a thread in computing. In a slab, the first channels of all vectors come first, then the second ones and
// so on: threads that stage neighbouring vectors so write neighbouring cells, and no two of them the same bank.
template <class Tiling>
struct Lane {
  unsigned lanes, index;     // cells of a pixel, and which of them is this thread's
  unsigned workers, worker;  // threads with the same channels; a worker that is none has worker >= workers
  unsigned channel, count;   // the first channel and how many there are of it

  __device__ __forceinline__ explicit Lane(const TileGrid& grid, unsigned slab = blockIdx.x)
      : lanes(recomputed(grid.slab) / Tiling::kChannels),
        index(threadIdx.x % lanes),
        workers(kDepthwiseThreads / lanes),
        worker(threadIdx.x / lanes),
        channel(channel_of(grid, index, slab)),
        count(channels_left(grid, channel)) {}

  __device__ __forceinline__ bool works() const { return worker < workers && count > 0; }

  static __device__ __forceinline__ unsigned channel_of(const TileGrid& grid, unsigned cell,
                                                        unsigned slab = blockIdx.x) {
    const unsigned vectors = grid.slab / Tiling::kVector;
    return slab * grid.slab + cell % vectors * Tiling::kVector + cell / vectors * Tiling::kChannels;
  }
};

// Weights at the front of shared memory, by taps; to be read after a barrier.
template <class Tiling, class Acc>
__device__ __forceinline__ void stage_weights(const TileGrid& grid, const Acc* weight,
                                              SharedPointer<typename Tiling::Cell> shared) {
  const unsigned lanes = grid.slab / Tiling::kChannels;
  for (unsigned i = threadIdx.x; i < Tiling::kTaps * lanes; i += kDepthwiseThreads) {
    const unsigned channel = Lane<Tiling>::channel_of(grid, i % lanes);
    typename Tiling::Cell cell;
#pragma unroll
    for (unsigned c = 0; c < Tiling::kChannels; ++c)
      cell.value[c] = channel + c < grid.channels ? weight[(channel + c) * Tiling::kTaps + i / lanes] : Acc(0);
    shared[i] = cell;
  }
}

template <class Tiling>
__device__ __forceinline__ void read_weights(SharedPointer<typename Tiling::Cell> shared, const Lane<Tiling>& lane,
                                             typename Tiling::Cell (&weight)[Tiling::kTaps]) {
#pragma unroll
  for (unsigned tap = 0; tap < Tiling::kTaps; ++tap) weight[tap] = shared[tap * lane.lanes + lane.index];
}

// What a source needs to know of a channel, as pairs in shared memory: registers would not hold it for a whole vector.
template <class Acc>
using CoefficientPair = Channels<Acc, 2>;

// How many of them there may be: of the widest slab.
template <class Source>
constexpr unsigned kCoefficients = Source::kPairs * kWidestSlab;

template <class Tiling, class Source, class Parameters>
__device__ __forceinline__ void stage_coefficients(const Parameters& p,
                                                   SharedPointer<CoefficientPair<typename Tiling::Acc>> coefficients) {
  const TileGrid& grid = p.grid;
  const unsigned vectors = grid.slab / Tiling::kVector;
  for (unsigned i = threadIdx.x; i < grid.slab * Source::kPairs; i += kDepthwiseThreads) {
    const unsigned row = i / vectors, channel = i % vectors * Tiling::kVector + row / Source::kPairs;
    coefficients[i] = Source::pair(p, blockIdx.x * grid.slab + channel, row % Source::kPairs);
  }
}

// A source says what the staged map of a sample holds: load(offset) fetches a vector's worth, cell() computes some
// channels of it with their coefficients. Outside the map are zeros.
template <class Tiling, class Source, unsigned kInFlight, class Parameters>
__device__ __forceinline__ void stage_tile(const Parameters& p, const Tile& tile,
                                           SharedPointer<CoefficientPair<typename Tiling::Acc>> coefficients,
                                           SharedPointer<typename Tiling::Cell> shared) {
  using Window = typename Tiling::Window;
  using Acc = typename Tiling::Acc;
  constexpr unsigned kChannels = Tiling::kChannels, kPairs = Source::kPairs;
  const TileGrid& grid = p.grid;
  const unsigned slab = recomputed(grid.slab), vectors = slab / Tiling::kVector, lanes = slab / kChannels;
  const unsigned vector = threadIdx.x % vectors, first = threadIdx.x / vectors, step = kDepthwiseThreads / vectors;
  if (first >= step) return;
  const unsigned channel = blockIdx.x * grid.slab + vector * Tiling::kVector;
  const Source source(p, tile.sample, channel);
  const int top = Window::scaled(int(tile.row)) - Window::kHalo,
            left = Window::scaled(int(tile.column)) - Window::kHalo;
  const unsigned columns = Window::extent(int(grid.tile_columns));
  const unsigned pixels = Window::extent(int(grid.tile_rows)) * columns;
  const unsigned step_rows = step / columns, step_columns = step % columns;
  unsigned row = first / columns, column = first % columns;
  for (unsigned pixel = first; pixel < pixels; pixel += kInFlight * step) {
    typename Source::Fetched fetched[kInFlight];
    bool inside[kInFlight];
#pragma unroll
    for (unsigned u = 0; u < kInFlight; ++u) {
      // Negative coordinates are very large ones.
      const unsigned y = unsigned(top + int(row)), x = unsigned(left + int(column));
      inside[u] =
          y < grid.staged_rows && x < grid.staged_columns && channel < grid.channels && pixel + u * step < pixels;
      if (inside[u]) fetched[u] = source.load((y * grid.staged_columns + x) * grid.channels);
      row += step_rows;
      column += step_columns;
      if (column >= columns) {
        column -= columns;
        ++row;
      }
    }
#pragma unroll
    for (unsigned j = 0; j < Tiling::kVector / kChannels; ++j) {
      CoefficientPair<Acc> pair[kChannels][kPairs];
#pragma unroll
      for (unsigned c = 0; c < kChannels; ++c)
#pragma unroll
        for (unsigned q = 0; q < kPairs; ++q)
          pair[c][q] = coefficients[((j * kChannels + c) * kPairs + q) * vectors + vector];
#pragma unroll
      for (unsigned u = 0; u < kInFlight; ++u) {
        if (pixel + u * step >= pixels) continue;
        typename Tiling::Cell cell = {};
        if (inside[u]) source.cell(fetched[u], j * kChannels, pair, cell.value);
        shared[Tiling::kTaps * lanes + (pixel + u * step) * lanes + j * vectors + vector] = cell;
      }
    }
  }
}

}  // namespace biasloss
