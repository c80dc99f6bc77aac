// How the window of a tile comes into shared memory, while the tile before it is computed.
#pragma once

#include "tile.cuh"

namespace biasloss {

// Rows of a tile's window that are not in the ring yet.
struct NewRows {
  Tile tile;
  unsigned first, count;  // of the window
  unsigned start;         // where in the ring the window begins
};

// A map that is one tile high, or one tile wide, has the same zeros around it in every window: they are written once.
template <class Tiling>
__device__ __forceinline__ NewRows whole_window(const TileGrid& grid, const Tile& tile) {
  using Window = typename Tiling::Window;
  if (grid.tiles_down == 1) return {tile, unsigned(Window::halo(grid.row_shift)), grid.staged_rows, 0};
  return {tile, 0, unsigned(Window::extent(int(grid.tile_rows))), 0};
}

// Of the tile after that of `before`.
template <class Tiling>
__device__ __forceinline__ NewRows rows_after(const TileGrid& grid, const NewRows& before, unsigned index) {
  const Tile tile = tile_at(grid, index);
  if (tile.row == 0) return whole_window<Tiling>(grid, tile);
  const unsigned rows = Tiling::Window::extent(int(grid.tile_rows)),
                 moved = Tiling::Window::scaled(int(grid.tile_rows));
  const unsigned start = before.start + moved;
  return {tile, rows - moved, moved, start < rows ? start : start - rows};
}

// Zeros for the ring, where some are never written again.
template <class Tiling>
__device__ __forceinline__ void clear_ring(const TileGrid& grid, SharedPointer<typename Tiling::Cell> shared) {
  if (grid.tiles_down != 1 && grid.tiles_across != 1) return;
  const Ring<Tiling> ring(grid);
  for (unsigned i = ring.begin() + threadIdx.x; i < ring.end(); i += kDepthwiseThreads) shared[i] = {};
}

// The part of a thread in staging: a vector of channels of some pixels. A source says what the staged map holds:
// load(offset) fetches a vector's worth, cell() computes some channels of it with their coefficients. Outside the map
// are zeros.
template <class Tiling, class Source>
class Stager {
 public:
  using Parameters = typename Source::Parameters;
  using Acc = typename Tiling::Acc;
  using Window = typename Tiling::Window;

  __device__ __forceinline__ explicit Stager(const Parameters& parameters) : p(parameters) {}

  // Loads the first pixels, which store() takes up.
  __device__ __forceinline__ void fetch(const NewRows& rows) {
    const Part part(p.grid);
    if (part.works()) load(rows, part, Walk(part, columns()));
  }

  __device__ __forceinline__ void store(const NewRows& rows, SharedPointer<CoefficientPair<Acc>> coefficients,
                                        SharedPointer<typename Tiling::Cell> shared) {
    const Part part(p.grid);
    if (!part.works()) return;
    const unsigned pixels = rows.count * columns();
    Walk walk(part, columns());
    for (unsigned pixel = part.first; pixel < pixels; pixel += Tiling::kInFlight * part.step) {
      if (pixel != part.first) load(rows, part, walk);
      walk = compute(rows, part, walk, coefficients, shared);
    }
  }

 private:
  // Worked out for every tile: registers are needed in between.
  struct Part {
    unsigned vectors, vector, channel;
    unsigned first, step;  // pixels

    __device__ __forceinline__ explicit Part(const TileGrid& grid)
        : vectors(recomputed(grid.slab) / Tiling::kVector),
          vector(threadIdx.x % vectors),
          channel(blockIdx.x * grid.slab + vector * Tiling::kVector),
          first(threadIdx.x / vectors),
          step(kDepthwiseThreads / vectors) {}

    __device__ __forceinline__ bool works() const { return first < step; }
  };

  // Pixel after pixel of the staged rows.
  struct Walk {
    unsigned row, column, columns, step_rows, step_columns;

    __device__ __forceinline__ Walk(const Part& part, unsigned staged_columns)
        : row(part.first / staged_columns),
          column(part.first % staged_columns),
          columns(staged_columns),
          step_rows(part.step / staged_columns),
          step_columns(part.step % staged_columns) {}

    __device__ __forceinline__ void next() {
      row += step_rows;
      column += step_columns;
      if (column < columns) return;
      column -= columns;
      ++row;
    }
  };

  __device__ __forceinline__ bool whole_width() const { return p.grid.tiles_across == 1; }
  __device__ __forceinline__ unsigned columns() const {
    return whole_width() ? p.grid.staged_columns : unsigned(Window::extent(int(p.grid.tile_columns)));
  }
  __device__ __forceinline__ unsigned first_column() const {
    return whole_width() ? unsigned(Window::halo(p.grid.column_shift)) : 0;
  }

  // Where the pixel lies in the map. Negative coordinates are very large ones.
  __device__ __forceinline__ unsigned map_row(const NewRows& rows, const Walk& walk) const {
    return unsigned(Window::scaled(int(rows.tile.row)) - Window::halo(p.grid.row_shift)) + rows.first + walk.row;
  }
  __device__ __forceinline__ unsigned map_column(const NewRows& rows, const Walk& walk) const {
    return unsigned(Window::scaled(int(rows.tile.column)) - Window::halo(p.grid.column_shift)) + first_column() +
           walk.column;
  }
  __device__ __forceinline__ bool inside(const NewRows& rows, const Part& part, const Walk& walk) const {
    return walk.row < rows.count && map_row(rows, walk) < p.grid.staged_rows &&
           map_column(rows, walk) < p.grid.staged_columns && part.channel < p.grid.channels;
  }

  __device__ __forceinline__ void load(const NewRows& rows, const Part& part, Walk walk) {
    const Source source(p, rows.tile.sample, part.channel);
#pragma unroll
    for (unsigned u = 0; u < Tiling::kInFlight; ++u) {
      if (inside(rows, part, walk))
        fetched_[u] =
            source.load((map_row(rows, walk) * p.grid.staged_columns + map_column(rows, walk)) * p.grid.channels);
      walk.next();
    }
  }

  // Returns where the walk goes on.
  __device__ __forceinline__ Walk compute(const NewRows& rows, const Part& part, Walk walk,
                                          SharedPointer<CoefficientPair<Acc>> coefficients,
                                          SharedPointer<typename Tiling::Cell> shared) const {
    constexpr unsigned kChannels = Tiling::kChannels, kPairs = Source::kPairs;
    const Ring<Tiling> ring(p.grid);
    const Source source(p, rows.tile.sample, part.channel);
    bool exists[Tiling::kInFlight], valued[Tiling::kInFlight];
    unsigned place[Tiling::kInFlight];
#pragma unroll
    for (unsigned u = 0; u < Tiling::kInFlight; ++u) {
      exists[u] = walk.row < rows.count;
      valued[u] = inside(rows, part, walk);
      place[u] = ring.at(rows.start, rows.first + walk.row, first_column() + walk.column) + part.vector;
      walk.next();
    }
    source.with_variant([&](auto variant) {
#pragma unroll
      for (unsigned j = 0; j < Tiling::kVector / kChannels; ++j) {
        CoefficientPair<Acc> pair[kChannels][kPairs];
#pragma unroll
        for (unsigned c = 0; c < kChannels; ++c)
#pragma unroll
          for (unsigned q = 0; q < kPairs; ++q)
            pair[c][q] = coefficients[((j * kChannels + c) * kPairs + q) * part.vectors + part.vector];
#pragma unroll
        for (unsigned u = 0; u < Tiling::kInFlight; ++u) {
          // Computed in any case, of anything: a branch would cost more.
          typename Tiling::Cell cell;
          source.cell(variant, fetched_[u], j * kChannels, pair, cell.value);
#pragma unroll
          for (unsigned c = 0; c < kChannels; ++c) cell.value[c] = valued[u] ? cell.value[c] : Acc(0);
          if (exists[u]) shared[place[u] + j * part.vectors] = cell;
        }
      }
    });
    return walk;
  }

  const Parameters& p;
  typename Source::Fetched fetched_[Tiling::kInFlight] = {};
};

// Stages tile after tile of the block's share, and calls compute(tile, start) for each, `start` being where its window
// begins in the ring. Shared memory is free again then.
template <class Tiling, class Source, class Parameters, class Compute>
__device__ __forceinline__ void for_each_tile(const Parameters& p,
                                              SharedPointer<CoefficientPair<typename Tiling::Acc>> coefficients,
                                              SharedPointer<typename Tiling::Cell> shared, Compute&& compute) {
  const Share share(p.grid);
  if (share.begin >= share.end) return;
  Stager<Tiling, Source> stager(p);
  NewRows rows = whole_window<Tiling>(p.grid, tile_at(p.grid, share.begin));
  stager.fetch(rows);
  for (unsigned i = share.begin; i < share.end; ++i) {
    stager.store(rows, coefficients, shared);
    __syncthreads();
    const NewRows present = rows;
    if (i + 1 < share.end) {
      rows = rows_after<Tiling>(p.grid, present, i + 1);
      stager.fetch(rows);
    }
    compute(present.tile, present.start);
    __syncthreads();
  }
}

}  // namespace biasloss
