// How a depthwise convolution is cut into pieces of work: by shape alone, so that no result depends on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows_simd.h"

namespace biasloss {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A piece is a group of samples, a band of output rows and a block of channels. Each leaves one partial result, which
// are merged in order.
class Partition {
 public:
  static constexpr int64_t kPieces = 32;             // as many as balance the threads; more cost more merging
  static constexpr int64_t kLeastPieces = 8;         // fewer samples than this are cut up
  static constexpr int64_t kLeastRows = 8;           // of a band, whose halo is computed twice
  static constexpr int64_t kCacheBytes = 192 << 10;  // what the rows in flight may take of L2

  // `bytes` a channel lie in cache during the march. Where channels cannot be cut, one block has them all.
  Partition(int64_t samples, int64_t channels, int64_t rows, int64_t lanes, int64_t bytes, bool cut_channels = true)
      : samples_(samples),
        channels_(channels),
        rows_(rows),
        lanes_(lanes),
        full_vectors_(std::max<int64_t>(1, channels / lanes)) {
    const int64_t vectors_in_cache = std::max<int64_t>(1, kCacheBytes / (bytes * lanes));
    if (cut_channels) blocks_ = (full_vectors_ + vectors_in_cache - 1) / vectors_in_cache;
    const auto times_wanted = [&](int64_t pieces, int64_t have) {
      return (pieces + have - 1) / std::max<int64_t>(1, have);
    };
    bands_ =
        std::clamp<int64_t>(times_wanted(kLeastPieces, samples * blocks_), 1, std::max<int64_t>(1, rows / kLeastRows));
    if (cut_channels)
      blocks_ = std::min(full_vectors_,
                         blocks_ * times_wanted(kLeastPieces, std::max<int64_t>(1, samples * blocks_ * bands_)));
    groups_ = std::clamp<int64_t>(times_wanted(kPieces, blocks_ * bands_), 1, std::max<int64_t>(1, samples));
  }

  int64_t pieces() const { return groups_ * bands_ * blocks_; }
  int64_t partials() const { return groups_ * bands_; }
  int64_t blocks() const { return blocks_; }

  int64_t partial(int64_t piece) const { return piece / blocks_; }
  int64_t block(int64_t piece) const { return piece % blocks_; }
  Range samples_of(int64_t partial) const { return part(samples_, groups_, partial / bands_); }
  Range rows_of(int64_t partial) const { return part(rows_, bands_, partial % bands_); }
  // Only the last block has a vector that overlaps another.
  Range channels_of(int64_t block) const {
    const Range vectors = part(full_vectors_, blocks_, block);
    return {vectors.begin * lanes_, block == blocks_ - 1 ? channels_ : vectors.end * lanes_};
  }
  // Per-channel values packed as in rows_simd.h, block behind block: where a block's begin, in vectors.
  int64_t first_vector(int64_t block) const { return part(full_vectors_, blocks_, block).begin; }
  int64_t vectors() const { return vectors_of(channels_, lanes_); }

 private:
  static Range part(int64_t count, int64_t parts, int64_t i) { return {count * i / parts, count * (i + 1) / parts}; }

  int64_t samples_, channels_, rows_, lanes_, full_vectors_;
  int64_t blocks_ = 1, bands_ = 1, groups_ = 1;
};

}  // namespace biasloss
