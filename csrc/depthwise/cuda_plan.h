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

// Besides coefficients and the like, which are twice as large in float64: without asking for more a block may have
// 48 KiB in all.
template <class Tiling>
constexpr int64_t kSharedBytes = (Tiling::kDouble ? 41 : 44) << 10;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Reductions at the end use the ring's memory: a row of taps, or three rows of moments, of every worker.
template <class Tiling>
int64_t cells(int64_t pixels, int64_t lanes) {
  return Tiling::kTaps * lanes + std::max<int64_t>(pixels * lanes, Tiling::kKernel * kDepthwiseThreads);
}

// How one map is cut.
struct Cut {
  int64_t slab, rows, columns;  // of a tile
  int64_t down, across;         // tiles of a map
  int64_t staged_rows, staged_columns;
};

// Costs are in instructions of a thread, roughly.
template <class Tiling>
struct Cost {
  using Window = typename Tiling::Window;
  const Cut& cut;

  int64_t window_columns() const { return cut.across == 1 ? cut.staged_columns : Window::extent(int(cut.columns)); }
  int64_t window_pixels() const {
    return (cut.down == 1 ? cut.staged_rows : Window::extent(int(cut.rows))) * window_columns();
  }
  int64_t new_pixels() const { return Window::scaled(int(cut.rows)) * window_columns(); }

  // What is not loaded while the tile before is computed, a thread waits for.
  int64_t staging(int64_t pixels) const {
    constexpr int64_t kValue = 10, kWait = 60;
    const int64_t stagers = kDepthwiseThreads / (cut.slab / Tiling::kVector);
    const int64_t pixels_of_thread = divide_up(pixels, stagers);
    return pixels_of_thread * Tiling::kVector * kValue + (divide_up(pixels_of_thread, Tiling::kInFlight) - 1) * kWait;
  }

  int64_t computing() const {
    constexpr int64_t kBarriers = 40, kOutput = 10;
    const int64_t workers = kDepthwiseThreads / (cut.slab / Tiling::kChannels);
    const int64_t items = (cut.rows / Tiling::kRows) * (cut.columns / Tiling::kColumns);
    return kBarriers + divide_up(items, workers) * Tiling::kRows * Tiling::kColumns * Tiling::kChannels *
                           (Window::kProducts + kOutput);
  }

  // Of a block with so many tiles, one after another.
  int64_t of_block(int64_t tiles) const {
    const bool within_strips = tiles % cut.down != 0;  // begins somewhere in a strip
    const int64_t strips = divide_up(tiles, cut.down) + (within_strips ? 1 : 0);
    const int64_t windows = std::min(strips, tiles);
    return windows * staging(window_pixels()) + (tiles - windows) * staging(new_pixels()) + tiles * computing();
  }

  // The last block reads every block's sums.
  int64_t of_finish(int64_t blocks) const {
    constexpr int64_t kValuesOfInstruction = 64;
    return blocks * (Tiling::kTaps + 2) * cut.slab / kValuesOfInstruction;
  }
};

// Of a tile whose window fits.
template <class Tiling>
int64_t most_rows(int64_t slab, int64_t tile_columns, int64_t shared_bytes) {
  using Window = typename Tiling::Window;
  const int64_t lanes = slab / Tiling::kChannels;
  const int64_t cells = shared_bytes / int64_t(sizeof(typename Tiling::Cell)) - Tiling::kTaps * lanes;
  const int64_t window_rows = cells / lanes / Window::extent(int(tile_columns));
  return Window::largest(int(window_rows)) / Tiling::kRows * Tiling::kRows;
}

}  // namespace plan

// Nothing to compute: one block a slab, which finishes its sums of nothing.
template <class Tiling>
DepthwisePlan plan_nothing(int64_t channels) {
  DepthwisePlan plan{};
  const int64_t vectors = std::max<int64_t>(plan::divide_up(channels, Tiling::kVector), 1);
  const auto bytes = [](int64_t slab) {
    return plan::cells<Tiling>(0, slab / Tiling::kChannels) * int64_t(sizeof(typename Tiling::Cell));
  };
  int64_t slab = std::min<int64_t>(vectors * Tiling::kVector, kWidestSlab);
  while (bytes(slab) > plan::kSharedBytes<Tiling>) slab -= Tiling::kVector;  // weights of 7 x 7 in float64
  plan.grid.channels = unsigned(channels);
  plan.grid.slab = unsigned(slab);
  plan.slabs = unsigned(std::max<int64_t>(plan::divide_up(channels, slab), 1));
  plan.blocks_of_slab = 1;
  plan.shared_bytes = size_t(bytes(slab));
  return plan;
}

// For `samples` maps of (rows, columns), computed from maps of (staged_rows, staged_columns). No slabs: not even one
// item fits.
template <class Tiling>
DepthwisePlan plan_depthwise(int64_t samples, int64_t channels, int64_t rows, int64_t columns, int64_t staged_rows,
                             int64_t staged_columns, int multiprocessors,
                             int64_t shared_bytes = plan::kSharedBytes<Tiling>) {
  using namespace plan;
  if (samples * channels * rows * columns == 0) return plan_nothing<Tiling>(channels);
  using Window = typename Tiling::Window;
  constexpr int64_t kVector = Tiling::kVector;
  const int64_t resident = int64_t(Tiling::kBlocks) * multiprocessors;
  // From two sectors of the L2 cache up, to as many channels as there are threads.
  const int64_t widest = std::min<int64_t>(round_up(channels, kVector), kWidestSlab);
  const int64_t narrowest = std::min<int64_t>(4 * kVector, widest);
  DepthwisePlan best{};
  int64_t lowest_cost = 0;
  const auto consider = [&](const Cut& cut) {
    const int64_t slabs = divide_up(channels, cut.slab), tiles = samples * cut.down * cut.across;
    if (tiles > std::numeric_limits<int32_t>::max()) return;
    // No more blocks than run at once: one that is left over would take as long as all others.
    const int64_t tiles_of_block = divide_up(tiles, std::max<int64_t>(resident / slabs, 1));
    const int64_t blocks = divide_up(tiles, tiles_of_block), rounds = divide_up(slabs, resident);
    const Cost<Tiling> costs = {cut};
    const int64_t cost = rounds * costs.of_block(tiles_of_block) + costs.of_finish(blocks);
    if (lowest_cost != 0 && cost >= lowest_cost) return;
    lowest_cost = cost;
    best.grid = {unsigned(tiles),
                 unsigned(channels),
                 unsigned(rows),
                 unsigned(columns),
                 unsigned(staged_rows),
                 unsigned(staged_columns),
                 unsigned(cut.slab),
                 unsigned(cut.rows),
                 unsigned(cut.columns),
                 unsigned(cut.down),
                 unsigned(cut.across),
                 unsigned(tiles_of_block),
                 false,
                 0,
                 0};
    best.slabs = unsigned(slabs);
    best.blocks_of_slab = unsigned(blocks);
    const int64_t pixels = int64_t(Window::extent(int(cut.rows))) * Window::extent(int(cut.columns));
    best.shared_bytes = size_t(cells<Tiling>(pixels, cut.slab / Tiling::kChannels)) * sizeof(typename Tiling::Cell);
  };
  for (int64_t slab = widest; slab >= narrowest; slab -= kVector)
    for (int64_t across = 1; across <= divide_up(columns, Tiling::kColumns); ++across) {
      const int64_t tile_columns = round_up(divide_up(columns, across), Tiling::kColumns);
      const int64_t most =
          std::min<int64_t>(most_rows<Tiling>(slab, tile_columns, shared_bytes), round_up(rows, Tiling::kRows));
      for (int64_t tile_rows = Tiling::kRows; tile_rows <= most; tile_rows += Tiling::kRows)
        consider({slab, tile_rows, tile_columns, divide_up(rows, tile_rows), divide_up(columns, tile_columns),
                  staged_rows, staged_columns});
    }
  return best;
}

}  // namespace biasloss
