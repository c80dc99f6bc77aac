// A run of pixels, each a row of channels, seen as a matrix with longer rows: several pixels a row where one pixel
// would not fill whole vectors. Column j holds values of channel j % channels; per-channel values are repeated to
// match.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace biasloss {

struct Tiles {
  // Narrower rows would leave too little work between two visits of an accumulator.
  static constexpr int64_t kNarrowest = 128;
  // Wider ones would not stay in the first cache with all that is kept for a column.
  static constexpr int64_t kWidest = 1024;

  Tiles(int64_t channels, int64_t pixels, int64_t lanes) : channels(channels) {
    if (channels == 0) return;
    int64_t copies = lanes / std::gcd(channels, lanes);
    if (copies * channels > kWidest) copies = 1;  // the last vector of a row overlaps the one before it
    while (copies * channels < kNarrowest) copies *= 2;
    width = copies * channels;
    rows = pixels / copies;
    tail = pixels % copies * channels;
  }

  int64_t channels, width = 0, rows = 0;
  int64_t tail = 0;  // values behind the last whole row; 0 where a row is one pixel
};

// (channels,) repeated to (width,); ones or zeros where there are none.
template <class T>
std::vector<T> repeated(const T* values, const Tiles& tiles, T otherwise = T(0)) {
  std::vector<T> row(tiles.width, otherwise);
  if (values != nullptr)
    for (int64_t j = 0; j < tiles.width; j += tiles.channels) std::copy_n(values, tiles.channels, row.data() + j);
  return row;
}

// The sums over columns that belong to the same channel, into the first `channels` of them.
inline void fold(std::vector<double>& columns, int64_t channels) {
  for (size_t j = channels; j < columns.size(); ++j) columns[j % channels] += columns[j];
}

// The fixed pieces that rows are summed up in, whatever the number of threads: long enough that combining them costs
// little, short enough that plain sums within one are accurate.
struct Chunks {
  static constexpr int64_t kLongest = 512, kShortest = 64, kFewest = 8;

  explicit Chunks(int64_t rows)
      : rows(rows),
        count(rows < kLongest ? std::max<int64_t>(rows / kShortest, 1)
                              : (rows + kFewest * kLongest - 1) / (kFewest * kLongest) * kFewest) {}
  int64_t begin(int64_t chunk) const { return rows * chunk / count; }

  int64_t rows, count;
};

}  // namespace biasloss
