#include "activated_simd.h"

#include "../depthwise/tiles_simd.h"
#include "../simd/activation.h"
#include "../simd/narrow.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// One channel vector of a row.
template <class T, class Scalar>
struct Column {
  VectorOf<Scalar> scale, shift, total;
  int64_t channels;  // that are left: fewer than lanes where there are no more
  T* to;
  int64_t stride;
};

// Of a tile, `count` columns from `begin` on.
template <Activation activation, class T, class Scalar>
void finish_tile(const VectorOf<Scalar>* y, int64_t begin, int64_t count, Column<T, Scalar>& column) {
  const VectorOf<Scalar> scale = column.scale, shift = column.shift;
  VectorOf<Scalar> total = column.total;
  T* to = column.to + begin * column.stride;
  for (int64_t t = 0; t < count; ++t, to += column.stride) {
    const VectorOf<Scalar> h = activate<activation>(y[t] * scale + shift);
    store_first(to, h, column.channels);
    total += sizeof(T) < 4 ? load_first(to, column.channels) : h;
  }
  column.total = total;
}

// Chosen once a row: as many copies of the convolution as there are activations would not stay in cache.
template <class T, class Scalar>
using Finish = void (*)(const VectorOf<Scalar>* y, int64_t begin, int64_t count, Column<T, Scalar>& column);

template <int kernel, int stride, class T, class Scalar>
void convolve(const Taps<Scalar>& taps, const Scalar* weight, RowSize size, const ActivatedRow<T, Scalar>& to) {
  constexpr int lanes = Compute<Scalar>::lanes, tile = kTileColumns;
  const Finish<T, Scalar> finish =
      with_activation(static_cast<Activation>(to.affine.activation),
                      [](auto activation) -> Finish<T, Scalar> { return finish_tile<activation.value, T, Scalar>; });
  for (int64_t v = 0; v < vectors_of(size.channels, lanes); ++v) {
    const int64_t c = first_channel(v, size.channels, lanes);
    Column<T, Scalar> column = {load_first(to.affine.scale + c, size.channels),
                                load_first(to.affine.shift + c, size.channels),
                                {},
                                size.channels,
                                to.h.data + c,
                                to.h.stride};
    for (int64_t q = 0; q < size.width; q += tile) {
      VectorOf<Scalar> sum[tile], y[tile];
      convolve_tile<kernel, stride>(taps, v * taps.columns * lanes, weight + v * kernel * kernel * lanes, q, sum);
      for (int t = 0; t < tile; ++t) y[t] = sum[t];  // sums whose address another function knows leave their registers
      finish(y, q, q + tile <= size.width ? tile : size.width - q, column);
    }
    if (to.sums != nullptr) store_first(to.sums + c, column.total, size.channels);
  }
}

template <class T, class Scalar = typename Compute<T>::Scalar>
constexpr ActivatedKernels<T, Scalar> kernels = {{{convolve<3, 1, T, Scalar>, convolve<3, 2, T, Scalar>},
                                                  {convolve<5, 1, T, Scalar>, convolve<5, 2, T, Scalar>},
                                                  {convolve<7, 1, T, Scalar>, convolve<7, 2, T, Scalar>}}};

}  // namespace

extern const ActivatedTables activated_tables;
const ActivatedTables activated_tables = {kernels<float>, kernels<double>, kernels<Float16>, kernels<BFloat16>};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
