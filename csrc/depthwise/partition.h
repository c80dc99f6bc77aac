// How a depthwise convolution is cut into pieces of work: by shape alone where partial results are merged, so that no
// result depends on the number of threads; by threads too where nothing is merged.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows_simd.h"

namespace biasloss {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range part_of(int64_t count, int64_t parts, int64_t i) { return {count * i / parts, count * (i + 1) / parts}; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Channels in blocks of whole vectors. Only the last block has a vector that overlaps another. Per-channel values are
// packed as in rows_simd.h, block behind block.
class ChannelBlocks {
 public:
  static constexpr int64_t kCacheBytes = 192 << 10;  // what the rows in flight may take of L2

  // `bytes` a channel lie in cache during the march.
  ChannelBlocks(int64_t channels, int64_t lanes, int64_t bytes, int64_t cache_bytes = kCacheBytes)
      : channels_(channels), lanes_(lanes), full_vectors_(std::max<int64_t>(1, channels / lanes)) {
    cut(divide_up(full_vectors_, std::max<int64_t>(1, cache_bytes / std::max<int64_t>(1, bytes * lanes))));
  }

  // One block that is not to be cut.
  static ChannelBlocks whole(int64_t channels, int64_t lanes) {
    ChannelBlocks one(channels, lanes, 0);
    one.can_be_cut_ = false;
    return one;
  }

  // As many blocks for every one of `threads`, where there is more than one block.
  void share_among(int64_t threads) {
    if (blocks_ > 1) cut(divide_up(blocks_, threads) * threads);
  }

  int64_t blocks() const { return blocks_; }
  int64_t vectors() const { return vectors_of(channels_, lanes_); }
  Range channels_of(int64_t block) const {
    return {first_vector(block) * lanes_, block == blocks_ - 1 ? channels_ : first_vector(block + 1) * lanes_};
  }
  // Where a block's packed values begin, in vectors. The last block is not the larger one: it has the rest as well.
  int64_t first_vector(int64_t block) const { return divide_up(full_vectors_ * block, blocks_); }
  // Of any block.
  int64_t most_channels() const {
    int64_t most = 0;
    for (int64_t block = 0; block < blocks_; ++block) most = std::max(most, channels_of(block).size());
    return most;
  }

 protected:
  void cut(int64_t blocks) {
    if (can_be_cut_) blocks_ = std::min(full_vectors_, blocks);
  }

 private:
  int64_t channels_, lanes_, full_vectors_, blocks_ = 1;
  bool can_be_cut_ = true;
};

// A piece is a group of samples, a band of output rows and a block of channels. Groups and bands each leave a partial
// result; these are merged in order.
class Partition : public ChannelBlocks {
 public:
  static constexpr int64_t kPieces = 32;      // as many as balance the threads; more cost more merging
  static constexpr int64_t kLeastPieces = 8;  // fewer samples than this are cut up
  static constexpr int64_t kLeastRows = 8;    // of a band, whose halo is computed twice

  // About `pieces`, where there are samples enough; at least `least`, where there are not.
  Partition(int64_t samples, int64_t rows, const ChannelBlocks& channels, int64_t pieces = kPieces,
            int64_t least = kLeastPieces)
      : ChannelBlocks(channels) {
    samples_ = samples, rows_ = rows;
    const int64_t at_least_one = std::max<int64_t>(1, samples);
    bands_ = std::clamp<int64_t>(divide_up(least, at_least_one * blocks()), 1, std::max<int64_t>(1, rows / kLeastRows));
    cut(blocks() * divide_up(least, at_least_one * blocks() * bands_));
    groups_ = std::clamp<int64_t>(divide_up(pieces, blocks() * bands_), 1, at_least_one);
  }

  int64_t pieces() const { return partials() * blocks(); }
  int64_t partials() const { return groups_ * bands_; }
  int64_t partial(int64_t piece) const { return piece / blocks(); }
  int64_t block(int64_t piece) const { return piece % blocks(); }
  Range samples_of(int64_t partial) const { return part_of(samples_, groups_, partial / bands_); }
  Range rows_of(int64_t partial) const { return part_of(rows_, bands_, partial % bands_); }

 private:
  int64_t samples_, rows_, bands_, groups_;
};

}  // namespace biasloss
