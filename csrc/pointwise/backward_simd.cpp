#include "../simd/isa.h"
#include "pointwise_simd.h"
#include "rows.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// dy = grad, as it is.
template <class T, class Scalar>
void load_gradient(const T* grad, int64_t rows, int64_t outputs, Scalar* dy, int64_t dy_stride) {
  for (int64_t row = 0; row < rows; ++row, grad += outputs, dy += dy_stride)
    for_vectors<Compute<T>::lanes>(
        outputs, [&](int64_t k, int64_t, auto count) { store_first(dy + k, load_first(grad + k, count), count); });
}

// dy = a * grad + b * (y - center) + c.
template <class T, class Scalar>
void load_gradient_behind_norm(const T* grad, const T* y, const Scalar* coefficients, int64_t rows, int64_t outputs,
                               Scalar* dy, int64_t dy_stride) {
  const Scalar *a = coefficients, *b = a + outputs, *c = b + outputs, *center = c + outputs;
  for (int64_t row = 0; row < rows; ++row, grad += outputs, y += outputs, dy += dy_stride)
    for_vectors<Compute<T>::lanes>(outputs, [&](int64_t k, int64_t, auto count) {
      const auto away = load_first(y + k, count) - load_first(center + k, count);
      const auto v = load_first(grad + k, count) * load_first(a + k, count) + away * load_first(b + k, count);
      store_first(dy + k, v + load_first(c + k, count), count);
    });
}

// The rows of one sample in a tile.
template <class T, class Scalar>
struct Part {
  int64_t rows, channels;
  const Scalar* dz;
  int64_t dz_stride;
  const T* x;
  const Scalar *scale, *shift, *center, *gate;
  const T* residual_grad;
  T* grad_x;
  Scalar* slot;  // kTerms rows of slot_stride
  int64_t slot_stride;
};

// dh = dz * gate + residual_grad, and what is summed over positions: nothing, the two sums that a normalization needs,
// or the gradient of the gate and all four. A gate alone is rare, and not worth a kernel of its own: its center is 0.
enum class Summed { nothing, norm, norm_and_gate };

template <Activation activation, Summed summed, class T, class Scalar>
void finish_part(const Part<T, Scalar>& p) {
  using Vector = typename Compute<T>::Vector;
  constexpr bool any = summed != Summed::nothing, gated = summed == Summed::norm_and_gate;
  constexpr int first_term = gated ? 0 : kSumOfGradient, terms = any ? kTerms : first_term;
  constexpr int step = gated ? 1 : kSumOfProducts - kSumOfGradient;
  for (int64_t i = 0; any && i < kTerms * p.slot_stride; ++i) p.slot[i] = 0;
  for_rows(p.rows, [&](int64_t row, int64_t at_once) {
    for_vectors<Compute<T>::lanes>(p.channels, [&](int64_t c, int64_t slot, auto count) {
      Vector scale = {}, shift = {}, center = {}, gate = {}, sum[kTerms] = {};
      if constexpr (any) {
        if (p.scale != nullptr) scale = load_first(p.scale + c, count), shift = load_first(p.shift + c, count);
        if (p.center != nullptr) center = load_first(p.center + c, count);
      }
      if constexpr (gated) gate = load_first(p.gate + c, count);
      for (int r = 0; r < at_once; ++r) {
        const int64_t at = (row + r) * p.channels + c;
        Vector dh = load_first(p.dz + (row + r) * p.dz_stride + c, count);
        Vector x = {}, u = {};
        if constexpr (any) {
          x = u = load_first(p.x + at, count);
          if (p.scale != nullptr) u = x * scale + shift;
        }
        if constexpr (gated) {
          sum[0] += dh * activate<activation>(u);
          dh *= gate;
        }
        if (p.residual_grad != nullptr) dh += load_first(p.residual_grad + at, count);
        if constexpr (any) {
          const Vector slope = derivative<activation>(u), away = x - center, du = dh * slope;
          sum[kSumOfGradient] += du;
          sum[kSumOfProducts] += du * away;
          if constexpr (gated) sum[2] += slope, sum[4] += slope * away;
        }
        if (p.grad_x != nullptr) store_first(p.grad_x + at, dh, count);
      }
      for (int term = first_term; term < terms; term += step) {
        Scalar* to = p.slot + term * p.slot_stride + slot;
        store(to, load(to) + sum[term]);
      }
    });
  });
  for (int term = first_term; term < terms; term += step) settle(p.slot + term * p.slot_stride, p.channels);
}

template <class T, class Scalar>
void finish_tile(const PointwiseBackward<Scalar>& p, int64_t tile, int64_t begin, int64_t end, const Scalar* dz,
                 int64_t dz_stride) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* residual_grad = static_cast<const T*>(p.residual_grad);
  auto* grad_x = static_cast<T*>(p.grad_x);
  const auto part = [&](int64_t sample, int64_t first, int64_t count) {
    const int64_t offset = first * p.channels;
    return Part<T, Scalar>{
        .rows = count,
        .channels = p.channels,
        .dz = dz + (first - begin) * dz_stride,
        .dz_stride = dz_stride,
        .x = x + offset,
        .scale = p.scale,
        .shift = p.shift,
        .center = p.center,
        .gate = p.gate == nullptr ? nullptr : p.gate + sample * p.channels,
        .residual_grad = residual_grad == nullptr ? nullptr : residual_grad + offset,
        .grad_x = grad_x == nullptr ? nullptr : grad_x + offset,
        .slot = p.slots + (tile + sample) * kTerms * p.slot_stride,
        .slot_stride = p.slot_stride,
    };
  };
  if (p.gate == nullptr && p.center == nullptr)
    return finish_part<Activation::identity, Summed::nothing>(part(0, begin, end - begin));
  with_activation(p.activation, [&](auto constant) {
    constexpr Activation activation = decltype(constant)::value;
    if (p.gate == nullptr) return finish_part<activation, Summed::norm>(part(0, begin, end - begin));
    for_samples(begin, end, p.positions, [&](int64_t sample, int64_t first, int64_t count) {
      finish_part<activation, Summed::norm_and_gate>(part(sample, first, count));
    });
  });
}

template <class T, class Scalar = typename Compute<T>::Scalar>
void backward_piece(const PointwiseBackward<Scalar>& p, int64_t piece, void* scratch) {
  const int64_t z_stride = buffer_stride<Scalar>(p.channels), dy_stride = buffer_stride<Scalar>(p.outputs);
  Parts parts(scratch);
  auto* dy = parts.take<Scalar>(p.tiles.largest() * dy_stride);
  auto* z = parts.take<Scalar>(p.tiles.largest() * z_stride);  // and then dz
  clear_padding(dy, p.tiles.largest(), p.outputs, dy_stride);
  clear_padding(z, p.tiles.largest(), p.channels, z_stride);
  Scalar* weight_grad = p.weight_grad;
  if (p.want_weight) weight_grad += piece * (p.transposed ? p.channels : p.outputs) * p.weight_grad_stride;
  const int64_t first_tile = piece * p.tiles.tiles_per_piece, end_of_piece = first_tile + p.tiles.tiles_per_piece;
  for (int64_t tile = first_tile; tile < end_of_piece; ++tile) {
    const int64_t begin = p.tiles.begin(tile), end = p.tiles.begin(tile + 1), rows = end - begin;
    const int64_t next_rows = tile + 1 < end_of_piece ? p.tiles.begin(tile + 2) - end : 0;
    const auto run_of = [](const void* map, int64_t first, int64_t count, int64_t channels, int64_t blocks) {
      const int64_t size = channels * int64_t(sizeof(T));
      return map == nullptr ? Fetch() : Fetch(static_cast<const char*>(map) + first * size, count * size, blocks);
    };
    const T* grad = static_cast<const T*>(p.grad) + begin * p.outputs;
    if (p.coefficients == nullptr)
      load_gradient(grad, rows, p.outputs, dy, dy_stride);
    else
      load_gradient_behind_norm(grad, static_cast<const T*>(p.y) + begin * p.outputs, p.coefficients, rows, p.outputs,
                                dy, dy_stride);
    if (p.want_weight) {
      load_tile<T>(p, begin, end, z, z_stride);
      const int64_t m = p.transposed ? p.channels : p.outputs, n = p.transposed ? p.outputs : p.channels;
      const int64_t blocks = blocks_of<Scalar>(m, n, rows);
      const void* y = p.coefficients == nullptr ? nullptr : p.y;
      Fetches fetch = {
          run_of(p.grad, end, next_rows, p.outputs, blocks), run_of(y, end, next_rows, p.outputs, blocks), {}};
      const Rows<Scalar> to = {weight_grad, p.weight_grad_stride};
      if (p.transposed)
        multiply<Scalar>({m, n, rows}, {z, 1, z_stride}, {dy, dy_stride}, to, tile > first_tile, fetch);
      else
        multiply<Scalar>({m, n, rows}, {dy, 1, dy_stride}, {z, z_stride}, to, tile > first_tile, fetch);
    }
    if (p.grad_x == nullptr && p.gate == nullptr && p.center == nullptr) continue;
    const int64_t blocks = blocks_of<Scalar>(rows, p.channels, p.outputs);
    Fetches fetch = {run_of(p.grad_x, begin, rows, p.channels, blocks),  // lines that are stored to are read first
                     run_of(p.residual_grad, begin, rows, p.channels, blocks),
                     run_of(p.x, end, next_rows, p.channels, blocks)};
    multiply<Scalar>({rows, p.channels, p.outputs}, {dy, dy_stride, 1}, {p.weight, p.weight_stride}, {z, z_stride},
                     false, fetch);
    finish_tile<T>(p, tile, begin, end, z, z_stride);
  }
}

int64_t scratch_bytes(const RowTiles& tiles, int64_t channels, int64_t outputs, int64_t scalar_bytes) {
  const int64_t lines = 2 * kLineBytes / scalar_bytes;  // a row's padding
  return tiles.largest() * (channels + outputs + 2 * lines) * scalar_bytes;
}

}  // namespace

extern const PointwiseBackwardTable pointwise_backward;
const PointwiseBackwardTable pointwise_backward = {
    BIASLOSS_VECTOR_BYTES,
    {pack<float>, pack<double>},
    scratch_bytes,
    {backward_piece<float>, backward_piece<double>, backward_piece<Float16>, backward_piece<BFloat16>},
};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
