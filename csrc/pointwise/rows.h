// Walks over tiles: vectors of a row, rows a few at a time, parts of a tile by sample. For *_simd.cpp files only.
#pragma once

#include "../simd/activation.h"
#include "../simd/gemm.h"
#include "../simd/narrow.h"

namespace biasloss {
namespace BIASLOSS_ISA {

// Calls f(column, slot, count) for vectors that cover a row. Where the width is no multiple of the vector, the last one
// overlaps the one before it, so that its accumulators need a slot of their own; `settle` moves what is new in it to
// its columns. Accumulators hold accumulator_stride() values. count is a constant unless the row is shorter than a
// vector.
template <int lanes, class F>
inline void for_vectors(int64_t width, const F& f) {
  if (width < lanes) return f(0, 0, width);
  // One call in the code for whole and overlapping vectors: every body is compiled once.
  for (int64_t slot = 0; slot < width; slot += lanes)
    f(slot + lanes <= width ? slot : width - lanes, slot, Fixed<lanes>());
}

template <class Scalar>
inline int64_t accumulator_stride(int64_t width) {
  return padded_columns<Scalar>(width);
}

template <class Scalar>
inline void settle(Scalar* accumulators, int64_t width) {
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t rest = width % lanes;
  if (width < lanes || rest == 0) return;
  Scalar* last = accumulators + width - rest;
  for (int64_t i = 0; i < rest; ++i) last[i] = last[lanes - rest + i];
}

// Calls f(row, count): what is loaded and stored for a column serves so many rows. Four, a constant; for the last,
// fewer.
template <class F>
inline void for_rows(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) f(row, Fixed<4>());
  if (row < rows) f(row, rows - row);
}

// Calls f(sample, first, count) for the parts of rows [begin, end) that belong to one sample each.
template <class F>
inline void for_samples(int64_t begin, int64_t end, int64_t positions, const F& f) {
  while (begin < end) {
    const int64_t sample = begin / positions, last = (sample + 1) * positions;
    const int64_t count = (last < end ? last : end) - begin;
    f(sample, begin, count);
    begin += count;
  }
}

// z = gate * act(scale * x + shift) for rows of one sample, or of any where gate is null.
template <Activation activation, class T, class Scalar>
inline void load_rows(const T* x, int64_t rows, int64_t channels, const Scalar* scale, const Scalar* shift,
                      const Scalar* gate, Scalar* z, int64_t z_stride) {
  for (int64_t row = 0; row < rows; ++row, x += channels, z += z_stride)
    for_vectors<Compute<T>::lanes>(channels, [&](int64_t c, int64_t, auto count) {
      auto h = load_first(x + c, count);
      if (scale != nullptr) h = activate<activation>(h * load_first(scale + c, count) + load_first(shift + c, count));
      if (gate != nullptr) h *= load_first(gate + c, count);
      store_first(z + c, h, count);
    });
}

// The same for rows [begin, end) of a map.
template <class T, class Parameters, class Scalar>
inline void load_tile(const Parameters& p, int64_t begin, int64_t end, Scalar* z, int64_t z_stride) {
  const T* x = static_cast<const T*>(p.x);
  with_activation(p.activation, [&](auto constant) {
    constexpr Activation activation = decltype(constant)::value;
    const auto part = [&](int64_t sample, int64_t first, int64_t count) {
      load_rows<activation>(x + first * p.channels, count, p.channels, p.scale, p.shift,
                            p.gate == nullptr ? nullptr : p.gate + sample * p.channels, z + (first - begin) * z_stride,
                            z_stride);
    };
    if (p.gate == nullptr)
      part(0, begin, end - begin);
    else
      for_samples(begin, end, p.positions, part);
  });
}

// Fetches runs of memory into the cache a few lines at a time, while a product keeps the arithmetic units busy: else
// memory would idle during products, and arithmetic while tiles are loaded and stored.
class Fetch {
 public:
  Fetch() : next_(nullptr), end_(nullptr), step_(0) {}
  // Before each of `blocks` blocks, so much that all of `bytes` has been fetched after the last.
  Fetch(const void* from, int64_t bytes, int64_t blocks)
      : next_(static_cast<const char*>(from)), end_(next_ + bytes), step_(parts_of(bytes, blocks * kLineBytes)) {}

  void operator()() {
    for (int64_t i = 0; i < step_ && next_ < end_; ++i, next_ += kLineBytes) __builtin_prefetch(next_);
  }

 private:
  const char *next_, *end_;
  int64_t step_;
};

// Several runs side by side. A type of its own, not a lambda: products are compiled once for all that call them.
struct Fetches {
  Fetch first, second, third;

  void operator()() { first(), second(), third(); }
};

// Parts of a scratch buffer, each on a cache line of its own.
class Parts {
 public:
  explicit Parts(void* buffer) : next_(static_cast<char*>(buffer)) {}

  template <class Scalar>
  Scalar* take(int64_t count) {
    auto* part = reinterpret_cast<Scalar*>(next_);
    next_ += padded_columns<Scalar>(count) * int64_t(sizeof(Scalar));
    return part;
  }

 private:
  char* next_;
};

// The columns behind the width are read as operands, and must not hold what slows arithmetic down.
template <class Scalar>
inline void clear_padding(Scalar* tile, int64_t rows, int64_t width, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = width; c < padded_columns<Scalar>(width); ++c) tile[row * stride + c] = 0;
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
