#include "gram_simd.h"

#include "../simd/gemm.h"
#include "../simd/narrow.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

constexpr int64_t kTileRows = 126;
// Rows of the matrix of products that are computed from their diagonal element on: whole vectors of every type.
constexpr int64_t kBlock = 48;

// z = x - pivot, and its sums over the rows.
template <class T, class Scalar>
void load_tile(const T* x, int64_t rows, int64_t channels, const Scalar* pivot, Scalar* z, int64_t z_stride,
               Scalar* sum) {
  constexpr int lanes = Compute<T>::lanes;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int64_t count = channels - c < lanes ? channels - c : lanes;
    const auto shift = load_first(pivot + c, count);
    auto total = load_first(sum + c, count);
    for (int64_t row = 0; row < rows; ++row) {
      const auto v = load_first(x + row * channels + c, count) - shift;
      store(z + row * z_stride + c, v);
      total += v;
    }
    store_first(sum + c, total, count);
  }
}

template <class T, class Scalar>
void gram_rows(const T* x, int64_t rows, int64_t channels, void* scratch, Scalar* pivot, Scalar* sum, Scalar* gram,
               int64_t gram_stride) {
  const int64_t z_stride = buffer_stride<Scalar>(channels);
  auto *z = static_cast<Scalar*>(scratch), *of_tile = z + kTileRows * z_stride;
  const int64_t first = rows < kTileRows ? rows : kTileRows;
  for (int64_t c = 0; c < channels; ++c) pivot[c] = sum[c] = 0;
  load_tile(x, first, channels, pivot, z, z_stride, sum);
  for (int64_t c = 0; c < channels; ++c) pivot[c] = sum[c] / Scalar(first), sum[c] = 0;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t count = rows - row < kTileRows ? rows - row : kTileRows;
    load_tile(x + row * channels, count, channels, pivot, z, z_stride, sum);
    // Sums of a tile, added to the sums of many: short chains of roundings.
    Scalar* products = row == 0 ? gram : of_tile;
    for (int64_t c = 0; c < channels; c += kBlock) {
      const int64_t height = channels - c < kBlock ? channels - c : kBlock, corner = c * gram_stride + c;
      multiply<Scalar>({height, channels - c, count}, {z + c, 1, z_stride}, {z + c, z_stride},
                       {products + corner, gram_stride}, false);
      for (int64_t i = 0; row > 0 && i < height; ++i)
        for (int64_t j = 0; j < channels - c; ++j)
          gram[corner + i * gram_stride + j] += of_tile[corner + i * gram_stride + j];
    }
  }
}

int64_t scratch_bytes(int64_t channels, int64_t scalar_bytes) {
  return (kTileRows + channels) * (channels * scalar_bytes + 2 * kLineBytes);
}

}  // namespace

extern const GramTable gram_table;
const GramTable gram_table = {scratch_bytes, gram_rows<float, float>, gram_rows<double, double>,
                              gram_rows<Float16, float>, gram_rows<BFloat16, float>};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
