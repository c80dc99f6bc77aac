// Products of small dense matrices that lie in cache: C (+)= A B with C in registers. For *_simd.cpp files only.
#pragma once

#include "../math/matrix.h"
#include "padding.h"
#include "vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {

// Rows and vectors of C that one block keeps in registers. Every step along the depth loads `vectors` vectors of B and
// broadcasts one value of A a row: enough sums to hide the latency of the multiply-add, few enough loads to feed it.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostVectors = 4;
constexpr int kBlockRows[kMostVectors + 1] = {0, 14, 14, 9, 6};
#elif defined(__AVX2__)
constexpr int kMostVectors = 3;
constexpr int kBlockRows[kMostVectors + 1] = {0, 8, 6, 4};
#else  // 16 registers, of which a product takes one before it is added
constexpr int kMostVectors = 2;
constexpr int kBlockRows[kMostVectors + 1] = {0, 8, 4};
#endif

// B's rows are taken in pieces of about this many, which stay in L1 while all rows of A pass.
constexpr int64_t kDepthPiece = 128;

template <int value>
struct Fixed {
  constexpr operator int64_t() const { return value; }
};

// `last` is the column of the last vector, which may overlap the one before it.
template <int rows, int vectors, class Scalar, class RowStride, class ColumnStride>
__attribute__((noinline)) void multiply_block(int64_t last, int64_t depth, Strided<Scalar, RowStride, ColumnStride> a,
                                              Rows<const Scalar> b, Rows<Scalar> c, bool accumulate) {
  using Vector = typename Compute<Scalar>::Vector;
  constexpr int lanes = Compute<Scalar>::lanes;
  Vector sum[rows][vectors] = {};
  const auto column = [last](int v) { return v < vectors - 1 ? int64_t(v * lanes) : last; };
  if (accumulate)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = load(c.data + r * c.stride + column(v));
  for (int64_t k = 0; k < depth; ++k, b.data += b.stride) {
    Vector of_b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) of_b[v] = load(b.data + column(v));
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Scalar of_a = a.data[r * a.row_stride + k * a.column_stride];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += of_a * of_b[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(c.data + r * c.stride + column(v), sum[r][v]);
}

// What is to be done before each block of a product: nothing.
struct Nothing {
  void operator()() const {}
};

// All rows of a panel: blocks of `block` rows, and what is left in halves of that.
template <int block, int vectors, class Before, class Scalar, class RowStride, class ColumnStride>
inline void multiply_rows(Before& before, int64_t rows, int64_t last, int64_t depth,
                          Strided<Scalar, RowStride, ColumnStride> a, Rows<const Scalar> b, Rows<Scalar> c,
                          bool accumulate) {
  for (; rows >= block; rows -= block, a.data += block * a.row_stride, c.data += block * c.stride) {
    before();
    multiply_block<block, vectors>(last, depth, a, b, c, accumulate);
  }
  if constexpr (block > 1)
    if (rows > 0) multiply_rows<block / 2, vectors>(before, rows, last, depth, a, b, c, accumulate);
}

template <int vectors, class Before, class... Arguments>
inline void multiply_panel(int64_t wanted, Before& before, Arguments... arguments) {
  if (wanted == vectors) return multiply_rows<kBlockRows[vectors], vectors>(before, arguments...);
  if constexpr (vectors > 1) multiply_panel<vectors - 1>(wanted, before, arguments...);
}

// `count` cut into equal parts of at most `largest`, and where part `i` of them begins.
inline int64_t parts_of(int64_t count, int64_t largest) { return (count + largest - 1) / largest; }
inline int64_t part_begin(int64_t count, int64_t parts, int64_t i) { return count * i / parts; }

// What is to be done before each block, and the rows of B of the panel or piece that comes next, fetched a few at a
// time: they are short and far apart, so that no CPU foresees them, and weights have often left the near caches.
template <class Before, class Scalar>
class FetchingRows {
 public:
  // `columns` of `rows` rows, within so many blocks.
  FetchingRows(Before& before, const Scalar* next, int64_t rows, int64_t columns, int64_t stride, int64_t blocks)
      : before_(before), next_(next), left_(rows), columns_(columns), stride_(stride), step_(parts_of(rows, blocks)) {}

  void operator()() {
    before_();
    for (int64_t i = 0; i < step_ && left_ > 0; ++i, --left_, next_ += stride_)
      for (int64_t column = 0; column < columns_; column += kLineBytes / int64_t(sizeof(Scalar)))
        __builtin_prefetch(next_ + column);
  }

 private:
  Before& before_;
  const Scalar* next_;
  int64_t left_, columns_, stride_, step_;
};

// Panels of columns, which the rows of B are passed through in pieces. Where `exact`, the last vector overlaps the one
// before it instead of reaching beyond the last column.
template <bool exact, class Before, class Scalar, class RowStride, class ColumnStride>
inline void multiply_panels(Before& before, ProductSize size, Strided<Scalar, RowStride, ColumnStride> a,
                            Rows<const Scalar> b, Rows<Scalar> c, bool accumulate) {
  const auto [rows, columns, depth] = size;
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t vectors = parts_of(columns, lanes);
  const int64_t pieces = depth == 0 ? 1 : parts_of(depth, kDepthPiece), panels = parts_of(vectors, kMostVectors);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t begin = part_begin(vectors, panels, panel), width = part_begin(vectors, panels, panel + 1) - begin;
    const int64_t column = begin * lanes;
    const int64_t last_vector = exact && panel == panels - 1 ? columns - lanes - column : (width - 1) * lanes;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = part_begin(depth, pieces, piece), last = part_begin(depth, pieces, piece + 1);
      const bool is_last = piece == pieces - 1;
      const int64_t next_first = is_last ? 0 : last, next_column = column + (is_last ? width * lanes : 0);
      const int64_t next_rows =
          is_last && panel == panels - 1 ? 0 : part_begin(depth, pieces, is_last ? 1 : piece + 2) - next_first;
      FetchingRows fetching(before, b.data + next_first * b.stride + next_column, next_rows, width * lanes, b.stride,
                            parts_of(rows, kBlockRows[width]));
      Strided<Scalar, RowStride, ColumnStride> a_piece = a;
      a_piece.data += first * a.column_stride;
      multiply_panel<kMostVectors>(width, fetching, rows, last_vector, last - first, a_piece,
                                   Rows<const Scalar>{b.data + first * b.stride + column, b.stride},
                                   Rows<Scalar>{c.data + column, c.stride}, accumulate || piece > 0);
    }
  }
}

// How often multiply() calls `before` for these sizes, nearly.
template <class Scalar>
inline int64_t blocks_of(int64_t rows, int64_t columns, int64_t depth) {
  const int64_t vectors = parts_of(columns, Compute<Scalar>::lanes), panels = parts_of(vectors, kMostVectors);
  return parts_of(rows, kBlockRows[parts_of(vectors, panels)]) * panels * parts_of(depth, kDepthPiece);
}

// C (+)= A B. C is rows x columns, A rows x depth with any strides (one of them 1, or it is slow: A may be transposed),
// B depth x columns. Rows of B and C are read and written in whole vectors: their strides must hold `columns` rounded
// up to padded_columns(); what lies there in B may be anything and changes nothing but the same columns of C. Every
// element of C is summed along the depth in order, whatever the other sizes. `accumulate` is false for C = A B.
// `before` is called before each block, a few hundred cycles of work: there is time to fetch what comes next.
template <class Scalar, class Before = Nothing>
inline void multiply(ProductSize size, Strided<Scalar> a, Rows<const Scalar> b, Rows<Scalar> c, bool accumulate,
                     Before&& before = Before()) {
  const auto columns_apart = [&](const Scalar* from) {
    return Strided<Scalar, Fixed<1>, int64_t>{from, {}, a.column_stride};
  };
  if (a.column_stride == 1) {
    const Strided<Scalar, int64_t, Fixed<1>> rows_apart = {a.data, a.row_stride, {}};
    multiply_panels<false>(before, size, rows_apart, b, c, accumulate);
  } else if (a.row_stride == 1) {
    multiply_panels<false>(before, size, columns_apart(a.data), b, c, accumulate);
  } else {
    for (int64_t row = 0; row < size.rows; ++row)
      multiply_panels<false>(before, {1, size.columns, size.depth}, columns_apart(a.data + row * a.row_stride), b,
                             Rows<Scalar>{c.data + row * c.stride, c.stride}, accumulate);
  }
}

// C (+)= A B, A row-major, for at least as many columns as a vector has lanes. No column behind the last one is read or
// written: B and C need no padding. The same values as of multiply(). The two vectors that overlap are of one panel,
// which reads all that it adds to before it stores.
template <class Scalar, class Before = Nothing>
inline void multiply_exact(ProductSize size, Rows<const Scalar> a, Rows<const Scalar> b, Rows<Scalar> c,
                           bool accumulate, Before&& before = Before()) {
  const Strided<Scalar, int64_t, Fixed<1>> rows_apart = {a.data, a.stride, {}};
  multiply_panels<true>(before, size, rows_apart, b, c, accumulate);
}

// Two vectors, zipped: the values of their lower, or upper, halves in turns.
template <bool upper, class V>
inline V zip(const V& a, const V& b) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  decltype(a < b) from = {};
  for (int i = 0; i < lanes; ++i) from[i] = i / 2 + (upper ? lanes / 2 : 0) + i % 2 * lanes;
  return __builtin_shuffle(a, b, from);
}

// to[r][c] = from[c][r] for a square of one vector each way: zipping each vector with the one half of them further on
// is a perfect shuffle of all values, and log2(lanes) of those transpose.
template <class Scalar>
inline void transpose_square(const Scalar* from, int64_t from_stride, Scalar* to, int64_t to_stride) {
  using Vector = typename Compute<Scalar>::Vector;
  constexpr int lanes = Compute<Scalar>::lanes;
  Vector v[lanes], zipped[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) v[i] = load(from + i * from_stride);
#pragma GCC unroll 4
  for (int step = 1; step < lanes; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      zipped[2 * i] = zip<false>(v[i], v[i + lanes / 2]);
      zipped[2 * i + 1] = zip<true>(v[i], v[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = zipped[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) store(to + i * to_stride, v[i]);
}

// Copies a rows x columns matrix of any strides into rows of `to_stride`, with zeros up to padded_columns(columns).
// With the strides exchanged it transposes.
template <class Scalar>
inline void pack(int64_t rows, int64_t columns, const Scalar* from, int64_t row_stride, int64_t column_stride,
                 Scalar* to, int64_t to_stride) {
  for (int64_t r = 0; column_stride == 1 && r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[r * to_stride + c] = from[r * row_stride + c];
  constexpr int64_t block = Compute<Scalar>::lanes;
  for (int64_t row = 0; column_stride != 1 && row < rows; row += block)
    for (int64_t column = 0; column < columns; column += block) {
      const Scalar* square = from + row * row_stride + column * column_stride;
      if (row_stride == 1 && row + block <= rows && column + block <= columns) {
        transpose_square(square, column_stride, to + row * to_stride + column, to_stride);
        continue;
      }
      for (int64_t r = 0; r < block && row + r < rows; ++r)
        for (int64_t c = 0; c < block && column + c < columns; ++c)
          to[(row + r) * to_stride + column + c] = square[r * row_stride + c * column_stride];
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = columns; c < padded_columns<Scalar>(columns); ++c) to[r * to_stride + c] = 0;
}

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
