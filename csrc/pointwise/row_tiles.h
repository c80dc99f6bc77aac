// How the rows of a map are cut: into pieces that threads take in any order, and these into tiles that stay in cache.
// Both follow from the shape alone, so that no result depends on the number of threads.
#pragma once

#include <cstdint>

#include "../math/macros.h"

namespace biasloss {

struct RowTiles {
  int64_t rows, pieces, tiles_per_piece;

  BIASLOSS_HOST_DEVICE int64_t tiles() const { return pieces * tiles_per_piece; }
  BIASLOSS_HOST_DEVICE int64_t begin(int64_t tile) const { return rows * tile / tiles(); }
  BIASLOSS_HOST_DEVICE int64_t largest() const { return (rows + tiles() - 1) / tiles(); }
  BIASLOSS_HOST_DEVICE int64_t tile_of(int64_t row) const { return ((row + 1) * tiles() - 1) / rows; }
};

// As many pieces as there are `rows_of_piece`, a power of two, so that they divide evenly among threads; tiles of about
// `values_of_tile` values of `values_of_row` each.
inline RowTiles row_tiles(int64_t rows, int64_t rows_of_piece, int64_t values_of_row, int64_t values_of_tile) {
  constexpr int64_t most_pieces = 32, longest_tile = 252;  // whole blocks of every size in csrc/simd/gemm.h
  int64_t pieces = 1;
  while (pieces < most_pieces && pieces * 2 * rows_of_piece <= rows) pieces *= 2;
  int64_t tile = values_of_tile / values_of_row;
  tile = tile < 18 ? 18 : (tile > longest_tile ? longest_tile : tile / 18 * 18);
  const int64_t rows_of_largest_piece = (rows + pieces - 1) / pieces;
  const int64_t tiles = (rows_of_largest_piece + tile - 1) / tile;
  return {rows, pieces, tiles == 0 ? 1 : tiles};
}

}  // namespace biasloss
