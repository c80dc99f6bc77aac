// The tiles of a block: who does what, and where a tile lies.
#pragma once

#include "../cuda/vector_load.cuh"
#include "cuda_parameters.h"

namespace biasloss {

// `count` of n elements, at least one, the rest zeros; n of them in one access where they lie and number right
// (`together`).
template <unsigned n, class T, class Acc>
__device__ __forceinline__ void load_values(const T* p, unsigned count, bool together, Acc (&value)[n]) {
  struct alignas(sizeof(T) * n) Packed {
    T element[n];
  };
  if (n == 1 || together) {
    const Packed packed = *reinterpret_cast<const Packed*>(p);
#pragma unroll
    for (unsigned i = 0; i < n; ++i) value[i] = static_cast<Acc>(packed.element[i]);
  } else {
#pragma unroll
    for (unsigned i = 0; i < n; ++i) value[i] = i < count ? static_cast<Acc>(p[i]) : Acc(0);
  }
}

template <unsigned n, class T>
__device__ __forceinline__ void store_values(T* p, unsigned count, bool together, const T (&value)[n]) {
  struct alignas(sizeof(T) * n) Packed {
    T element[n];
  };
  if (n == 1 || together) {
    Packed packed;
#pragma unroll
    for (unsigned i = 0; i < n; ++i) packed.element[i] = value[i];
    *reinterpret_cast<Packed*>(p) = packed;
  } else {
#pragma unroll
    for (unsigned i = 0; i < n; ++i)
      if (i < count) p[i] = value[i];
  }
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

// Down a strip first, then across a sample.
__device__ __forceinline__ Tile tile_at(const TileGrid& grid, unsigned index) {
  const unsigned strip = index / grid.tiles_down;
  return {strip / grid.tiles_across, index % grid.tiles_down * grid.tile_rows,
          strip % grid.tiles_across * grid.tile_columns};
}

// The tiles of this block, one after another.
struct Share {
  unsigned begin, end;

  __device__ __forceinline__ explicit Share(const TileGrid& grid)
      : begin(blockIdx.y * grid.tiles_of_block),
        end(begin + grid.tiles_of_block < grid.tiles ? begin + grid.tiles_of_block : grid.tiles) {}
};

// Shared memory holds the window of a tile as a ring of rows: the tile below needs some of the same ones.
template <class Tiling>
struct Ring {
  using Window = typename Tiling::Window;
  unsigned rows, columns, lanes;  // cells in all three dimensions

  __device__ __forceinline__ explicit Ring(const TileGrid& grid)
      : rows(Window::extent(int(grid.tile_rows))),
        columns(Window::extent(int(grid.tile_columns))),
        lanes(recomputed(grid.slab) / Tiling::kChannels) {}

  // Behind the weights.
  __device__ __forceinline__ unsigned begin() const { return Tiling::kTaps * lanes; }
  __device__ __forceinline__ unsigned row_of_cells() const { return columns * lanes; }
  __device__ __forceinline__ unsigned end() const { return begin() + rows * row_of_cells(); }
  // A cell of the window that begins at row `start` of the ring.
  __device__ __forceinline__ unsigned at(unsigned start, unsigned row, unsigned column) const {
    return begin() + (slot(start, row) * columns + column) * lanes;
  }
  __device__ __forceinline__ unsigned below(unsigned cell) const {
    const unsigned next = cell + row_of_cells();
    return next < end() ? next : next - rows * row_of_cells();
  }
  __device__ __forceinline__ unsigned slot(unsigned start, unsigned row) const {
    return start + row < rows ? start + row : start + row - rows;
  }
};

// The part of a thread in computing. In a slab, the first channels of all vectors come first, then the second ones and
// so on: threads that stage neighboring vectors so write neighboring cells, and no two of them the same bank.
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

}  // namespace biasloss
