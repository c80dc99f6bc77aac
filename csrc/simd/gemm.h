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

// Hides where a value comes from, so that the compiler computes nothing from it ahead of a loop.
template <class V>
inline V opaque(V v) {
  __asm__("" : "+r"(v));
  return v;
}

// The values of one column of some rows of A.
template <int rows, class Scalar, class RowStride>
class RowsOfA {
 public:
  RowsOfA(const Scalar* a, RowStride stride) : a_(a), stride_(stride) {}
  void next(int64_t stride) { a_ += stride; }
  Scalar operator[](int row) const { return a_[row * stride_]; }

 private:
  const Scalar* a_;
  RowStride stride_;
};

// Rows at a distance that is known at run time. Five share a pointer, and lie up to four strides behind it, which x86
// adds as it loads: with an offset for each, the compiler runs out of registers.
template <int rows, class Scalar>
class RowsOfA<rows, Scalar, int64_t> {
 public:
  RowsOfA(const Scalar* a, int64_t stride) : stride_(stride * int64_t(sizeof(Scalar))), thrice_(3 * stride_) {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) at_[i] = opaque(reinterpret_cast<const char*>(a + 5 * i * stride));
  }
  void next(int64_t stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) at_[i] += stride * int64_t(sizeof(Scalar));
    stride_ = opaque(stride_);
    thrice_ = opaque(thrice_);
  }
  Scalar operator[](int row) const {
    const int64_t behind = row % 5 == 3 ? thrice_ : row % 5 * stride_;
    return *reinterpret_cast<const Scalar*>(at_[row / 5] + behind);
  }

 private:
  static constexpr int kPointers = (rows + 4) / 5;
  int64_t stride_, thrice_;
  const char* at_[kPointers];
};

// Where the vectors of a panel of B and of C begin: the last one of C may overlap the one before it.
struct PanelColumns {
  int64_t b_vector, last_of_b, last_of_c;
};

template <int rows, int vectors, class Scalar, class RowStride, class ColumnStride>
__attribute__((noinline)) void multiply_block(PanelColumns columns, int64_t depth,
                                              Strided<Scalar, RowStride, ColumnStride> a, Rows<const Scalar> b,
                                              Rows<Scalar> c, bool accumulate) {
  using Vector = typename Compute<Scalar>::Vector;
  constexpr int lanes = Compute<Scalar>::lanes;
  Vector sum[rows][vectors] = {};
  const auto column = [columns](int v) { return v < vectors - 1 ? int64_t(v * lanes) : columns.last_of_c; };
  const auto column_of_b = [columns](int v) { return v < vectors - 1 ? v * columns.b_vector : columns.last_of_b; };
  if (accumulate)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = load(c.data + r * c.stride + column(v));
  RowsOfA<rows, Scalar, RowStride> column_of_a(a.data, a.row_stride);
  for (int64_t k = 0; k < depth; ++k, b.data += b.stride) {
    Vector of_b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) of_b[v] = load(b.data + column_of_b(v));
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Scalar of_a = column_of_a[r];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += of_a * of_b[v];
    }
    column_of_a.next(a.column_stride);
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
inline void multiply_rows(Before& before, int64_t rows, PanelColumns columns, int64_t depth,
                          Strided<Scalar, RowStride, ColumnStride> a, Rows<const Scalar> b, Rows<Scalar> c,
                          bool accumulate) {
  for (; rows >= block; rows -= block, a.data += block * a.row_stride, c.data += block * c.stride) {
    before();
    multiply_block<block, vectors>(columns, depth, a, b, c, accumulate);
  }
  if constexpr (block > 1)
    if (rows > 0) multiply_rows<block / 2, vectors>(before, rows, columns, depth, a, b, c, accumulate);
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
  // `vectors` of `rows` rows, within so many blocks.
  FetchingRows(Before& before, const Scalar* next, int64_t rows, int64_t vectors, int64_t row_stride,
               int64_t vector_stride, int64_t blocks)
      : before_(before),
        next_(next),
        left_(rows),
        vectors_(vectors),
        row_stride_(row_stride),
        vector_stride_(vector_stride),
        step_(parts_of(rows, blocks)) {}

  void operator()() {
    before_();
    for (int64_t i = 0; i < step_ && left_ > 0; ++i, --left_, next_ += row_stride_)
      for (int64_t v = 0; v < vectors_; ++v) __builtin_prefetch(next_ + v * vector_stride_);
  }

 private:
  Before& before_;
  const Scalar* next_;
  int64_t left_, vectors_, row_stride_, vector_stride_, step_;
};

// Where the values of B lie.
enum class Layout {
  padded_rows,  // row by row, in whole vectors
  exact_rows,   // row by row. The last vector of a row overlaps the one before it
  vectors       // one vector of every row behind the other, then the next vector. The last one overlaps, too, if
                // there are as many columns as lanes
};

// Panels of columns, which the rows of B are passed through in pieces. The stride of B is from one row to the next or,
// of vectors, from one vector to the next.
template <Layout layout, class Before, class Scalar, class RowStride, class ColumnStride>
inline void multiply_panels(Before& before, ProductSize size, Strided<Scalar, RowStride, ColumnStride> a,
                            Rows<const Scalar> b, Rows<Scalar> c, bool accumulate) {
  const auto [rows, columns, depth] = size;
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t b_row = layout == Layout::vectors ? lanes : b.stride;
  const int64_t b_vector = layout == Layout::vectors ? b.stride : lanes;
  const int64_t vectors = parts_of(columns, lanes);
  const int64_t pieces = depth == 0 ? 1 : parts_of(depth, kDepthPiece), panels = parts_of(vectors, kMostVectors);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t begin = part_begin(vectors, panels, panel), width = part_begin(vectors, panels, panel + 1) - begin;
    const int64_t column = begin * lanes;
    const bool overlaps = layout != Layout::padded_rows && panel == panels - 1 && columns >= lanes;
    const int64_t last_of_c = overlaps ? columns - lanes - column : (width - 1) * lanes;
    const int64_t last_of_b = layout == Layout::exact_rows ? last_of_c : (width - 1) * b_vector;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = part_begin(depth, pieces, piece), last = part_begin(depth, pieces, piece + 1);
      const bool is_last = piece == pieces - 1;
      const int64_t next_first = is_last ? 0 : last, next_vector = begin + (is_last ? width : 0);
      const int64_t next_rows =
          is_last && panel == panels - 1 ? 0 : part_begin(depth, pieces, is_last ? 1 : piece + 2) - next_first;
      FetchingRows fetching(before, b.data + next_first * b_row + next_vector * b_vector, next_rows, width, b_row,
                            b_vector, parts_of(rows, kBlockRows[width]));
      Strided<Scalar, RowStride, ColumnStride> a_piece = a;
      a_piece.data += first * a.column_stride;
      multiply_panel<kMostVectors>(width, fetching, rows, PanelColumns{b_vector, last_of_b, last_of_c}, last - first,
                                   a_piece, Rows<const Scalar>{b.data + first * b_row + begin * b_vector, b_row},
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
    multiply_panels<Layout::padded_rows>(before, size, rows_apart, b, c, accumulate);
  } else if (a.row_stride == 1) {
    multiply_panels<Layout::padded_rows>(before, size, columns_apart(a.data), b, c, accumulate);
  } else {
    for (int64_t row = 0; row < size.rows; ++row)
      multiply_panels<Layout::padded_rows>(before, {1, size.columns, size.depth},
                                           columns_apart(a.data + row * a.row_stride), b,
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
  multiply_panels<Layout::exact_rows>(before, size, rows_apart, b, c, accumulate);
}

// C = A B, A row-major, B in Layout::vectors: these are all of its columns, or whole vectors of them, or these and the
// last ones. C is written in whole vectors: a row must have room for one.
template <class Scalar, class Before = Nothing>
inline void multiply_vectors(ProductSize size, Rows<const Scalar> a, Rows<const Scalar> b, Rows<Scalar> c,
                             Before&& before = Before()) {
  const Strided<Scalar, int64_t, Fixed<1>> rows_apart = {a.data, a.stride, {}};
  multiply_panels<Layout::vectors>(before, size, rows_apart, b, c, false);
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
