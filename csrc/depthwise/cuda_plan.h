// How a batch is cut into tiles and slabs: the cheapest of all cuts by a simple model of a block's work.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cuda_parameters.h"

namespace biasloss {

struct DepthwisePlan {
  TileGrid grid;
  unsigned slabs, blocks_of_slab;
  size_t shared_bytes;

  // Of the partial results of all blocks, so many rows each; see finish.cuh.
  int64_t partial_values(int64_t rows) const { return int64_t(slabs) * blocks_of_slab * rows * grid.slab; }
};

namespace plan {

// Besides the coefficients: without asking for more a block may have 48 KiB in all.
constexpr int64_t kSharedBytes = 40 << 10;
constexpr int64_t kBlocksOfMultiprocessor = 4;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <class Tiling>
int64_t cells(int64_t pixels, int64_t lanes) {
  // The reductions at the end use the tile's memory, a row of taps at a time.
  return Tiling::kTaps * lanes + std::max<int64_t>(pixels * lanes, Tiling::kKernel * kDepthwiseThreads);
}

// In instructions of a thread, roughly: what staging a tile and computing its items takes one block.
template <class Tiling>
int64_t cost_of_tile(int64_t slab, int64_t rows, int64_t columns, int64_t pixels) {
  const int64_t stagers = kDepthwiseThreads / (slab / Tiling::kVector);
  const int64_t workers = kDepthwiseThreads / (slab / Tiling::kChannels);
  const int64_t items = (rows / Tiling::kRows) * (columns / Tiling::kColumns);
  return divide_up(pixels, stagers) * Tiling::kVector * 10 + divide_up(items, workers) * Tiling::kRows *
                                                                 Tiling::kColumns * Tiling::kChannels *
                                                                 (Tiling::Window::kProducts + 10);
}

}  // namespace plan

// Nothing to compute: one block a slab, which finishes its sums of nothing.
template <class Tiling>
DepthwisePlan plan_nothing(int64_t channels) {
  DepthwisePlan plan{};
  const int64_t vectors = std::max<int64_t>(plan::divide_up(channels, Tiling::kVector), 1);
  const int64_t slab = std::min<int64_t>(vectors * Tiling::kVector, kWidestSlab);
  plan.grid.channels = unsigned(channels);
  plan.grid.slab = unsigned(slab);
  plan.slabs = unsigned(std::max<int64_t>(plan::divide_up(channels, slab), 1));
  plan.blocks_of_slab = 1;
  plan.shared_bytes = size_t(plan::cells<Tiling>(0, slab / Tiling::kChannels)) * sizeof(typename Tiling::Cell);
  return plan;
}

// For `samples` maps of (rows, columns), computed from maps of (staged_rows, staged_columns). No slabs: not even one
// item fits.
template <class Tiling>
DepthwisePlan plan_depthwise(int64_t samples, int64_t channels, int64_t rows, int64_t columns, int64_t staged_rows,
                             int64_t staged_columns, int multiprocessors, int64_t shared_bytes = plan::kSharedBytes) {
  using namespace plan;
  if (samples * channels * rows * columns == 0) return plan_nothing<Tiling>(channels);
  using Window = typename Tiling::Window;
  constexpr int64_t kVector = Tiling::kVector, kLane = Tiling::kChannels;
  const int64_t resident = kBlocksOfMultiprocessor * multiprocessors;
  // From two sectors of the L2 cache up, to as many channels as there are threads.
  const int64_t widest = std::min<int64_t>(round_up(channels, kVector), kWidestSlab);
  const int64_t narrowest = std::min<int64_t>(4 * kVector, widest);
  DepthwisePlan best{};
  int64_t lowest_cost = 0;
  for (int64_t slab = widest; slab >= narrowest; slab -= kVector) {
    const int64_t slabs = divide_up(channels, slab), lanes = slab / kLane;
    const int64_t most_cells = shared_bytes / int64_t(sizeof(typename Tiling::Cell)) - Tiling::kTaps * lanes;
    for (int64_t across = 1; across <= divide_up(columns, Tiling::kColumns); ++across) {
      const int64_t tile_columns = round_up(divide_up(columns, across), Tiling::kColumns);
      const int64_t pixels_across = Window::extent(int(tile_columns));
      const int64_t most_rows =
          Window::largest(int(most_cells / lanes / pixels_across)) / Tiling::kRows * Tiling::kRows;
      if (most_rows <= 0) continue;
      const int64_t tile_rows = round_up(divide_up(rows, divide_up(rows, most_rows)), Tiling::kRows);
      const int64_t down = divide_up(rows, tile_rows), pixels = Window::extent(int(tile_rows)) * pixels_across;
      const int64_t tiles = samples * down * divide_up(columns, tile_columns);
      if (tiles > std::numeric_limits<int32_t>::max()) continue;
      const int64_t tiles_of_block = divide_up(tiles * slabs, resident);
      const int64_t cost = tiles_of_block * cost_of_tile<Tiling>(slab, tile_rows, tile_columns, pixels);
      if (lowest_cost != 0 && cost >= lowest_cost) continue;
      lowest_cost = cost;
      best.grid = {unsigned(tiles),
                   unsigned(channels),
                   unsigned(rows),
                   unsigned(columns),
                   unsigned(staged_rows),
                   unsigned(staged_columns),
                   unsigned(slab),
                   unsigned(tile_rows),
                   unsigned(tile_columns),
                   unsigned(down),
                   unsigned(divide_up(columns, tile_columns)),
                   false};
      best.slabs = unsigned(slabs);
      best.blocks_of_slab = unsigned(divide_up(tiles, tiles_of_block));
      best.shared_bytes = size_t(cells<Tiling>(pixels, lanes)) * sizeof(typename Tiling::Cell);
    }
  }
  return best;
}

}  // namespace biasloss
