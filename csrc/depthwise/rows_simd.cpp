#include "rows_simd.h"

#include "../simd/activation.h"
#include "../simd/narrow.h"
#include "tiles_simd.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// Columns for which per-channel values stay in registers. Few, so that memory is read almost in order.
constexpr int64_t kColumnsAtOnce = 8;

// Calls prepare(first channel) for every channel vector, and what that returns with every column of a group.
template <int lanes, class Prepare>
inline void for_each_vector(RowSize size, const Prepare& prepare) {
  const int64_t vectors = vectors_of(size.channels, lanes);
  for (int64_t begin = 0; begin < size.width; begin += kColumnsAtOnce) {
    const int64_t end = begin + kColumnsAtOnce < size.width ? begin + kColumnsAtOnce : size.width;
    for (int64_t v = 0; v < vectors; ++v) {
      const auto body = prepare(v, first_channel(v, size.channels, lanes));
      for (int64_t q = begin; q < end; ++q) body(q);
    }
  }
}

template <class T, class Scalar>
void activate_row(MapRow<const T> x, RowSize size, Affine<Scalar> affine, Strip<Scalar> strip) {
  using Vector = VectorOf<Scalar>;
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t channels = size.channels;
  with_activation(static_cast<Activation>(affine.activation), [&](auto activation) {
    for_each_vector<lanes>(size, [&](int64_t v, int64_t c) {
      const bool normalized = affine.scale != nullptr;
      const Vector scale = normalized ? load_first(affine.scale + c, channels) : Vector{} + 1;
      const Vector shift = normalized ? load_first(affine.shift + c, channels) : Vector{};
      const T* from = x.data + c;
      Scalar* to = strip.data + v * strip.columns * lanes;
      return [=](int64_t q) {
        const Vector u = load_first(from + q * x.stride, channels) * scale + shift;
        store(to + q * lanes, activate<decltype(activation)::value>(u));
      };
    });
  });
}

template <class T, class Scalar>
void output_gradient(const OutputGradient<T, Scalar>& from, RowSize size, Strip<Scalar> strip) {
  using Vector = VectorOf<Scalar>;
  constexpr int lanes = Compute<Scalar>::lanes;
  if (from.y.data == nullptr) return activate_row<T, Scalar>(from.grad, size, {}, strip);
  const int64_t channels = size.channels;
  with_activation(static_cast<Activation>(from.affine.activation), [&](auto activation) {
    for_each_vector<lanes>(size, [&](int64_t v, int64_t c) {
      const bool normalized = from.affine.scale != nullptr;
      const Vector scale = normalized ? load_first(from.affine.scale + c, channels) : Vector{} + 1;
      const Vector shift = normalized ? load_first(from.affine.shift + c, channels) : Vector{};
      const Vector of_pool = from.pool_grad == nullptr ? Vector{} : load_first(from.pool_grad + c, channels);
      const Vector constant = of_pool * from.pool_scale;
      const Vector a = load_first(from.coefficients[0] + c, channels);
      const Vector b = load_first(from.coefficients[1] + c, channels);
      const Vector offset = load_first(from.coefficients[2] + c, channels);
      const Vector center = load_first(from.coefficients[3] + c, channels);
      const T* grad = from.grad.data == nullptr ? nullptr : from.grad.data + c;
      const T* y = from.y.data + c;
      const int64_t grad_stride = from.grad.stride, y_stride = from.y.stride;
      Scalar* to = strip.data + v * strip.columns * lanes;
      return [=](int64_t q) {
        const Vector value = load_first(y + q * y_stride, channels);
        const Vector dh = grad == nullptr ? constant : load_first(grad + q * grad_stride, channels) + constant;
        const Vector du = dh * derivative<decltype(activation)::value>(value * scale + shift);
        store(to + q * lanes, a * du + (b * (value - center) + offset));
      };
    });
  });
}

// The sums of one row about the mean so far, merged into the running moments: see csrc/math/moments.h.
template <class Scalar>
struct MomentsOfRow {
  using Vector = VectorOf<Scalar>;
  static constexpr int lanes = Compute<Scalar>::lanes;
  Scalar* values = nullptr;
  int64_t count = 0;
  Vector shift = {}, mean = {}, center = {}, sum = {}, squares = {};

  MomentsOfRow() = default;
  MomentsOfRow(RunningMoments<Scalar> moments, int64_t vector, const Vector& example)
      : values(moments.values + vector * 3 * lanes), count(moments.count) {
    shift = count == 0 ? example : load(values);
    mean = count == 0 ? Vector{} : load(values + lanes);
    center = shift + mean;
  }
  void add(const Vector& value) {
    const Vector d = value - center;
    sum += d;
    squares += d * d;
  }
  void merge(int64_t added) {
    const Scalar n = Scalar(added), total = Scalar(count + added), fraction = n / total;
    const Vector mean_of_row = sum * (1 / n);
    Vector m2 = squares - sum * mean_of_row;
    m2 = m2 < Vector{} ? Vector{} : m2;
    const Vector delta = (center - shift) + mean_of_row - mean;
    const Vector before = count == 0 ? Vector{} : load(values + 2 * lanes);
    store(values, shift);
    store(values + lanes, mean + delta * fraction);
    store(values + 2 * lanes, before + m2 + delta * delta * (Scalar(count) * fraction));
  }
};

template <int kernel, int stride, int tile, bool with_moments, class T, class Scalar>
void convolve_row(const Taps<Scalar>& taps, const Scalar* weight, RowSize size, MapRow<T> y,
                  RunningMoments<Scalar> moments) {
  using Vector = typename Compute<Scalar>::Vector;
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t vectors = vectors_of(size.channels, lanes), channels = size.channels;
  for (int64_t v = 0; v < vectors; ++v) {
    T* to = y.data + first_channel(v, channels, lanes);
    const Scalar* w = weight + v * kernel * kernel * lanes;
    MomentsOfRow<Scalar> row;
    const auto emit = [&](int64_t q, const Vector& value) {
      store_first(to + q * y.stride, value, channels);
      if constexpr (with_moments) row.add(sizeof(T) < 4 ? load_first(to + q * y.stride, channels) : value);
    };
    for (int64_t q = 0; q < size.width; q += tile) {
      Vector sum[tile];
      convolve_tile<kernel, stride>(taps, v * taps.columns * lanes, w, q, sum);
      if constexpr (with_moments)
        if (q == 0) row = MomentsOfRow<Scalar>(moments, v, sum[size.width > 3 ? 3 : 0]);
      if (q + tile <= size.width) {
#pragma GCC unroll 8
        for (int t = 0; t < tile; ++t) emit(q + t, sum[t]);
      } else {
        for (int64_t t = 0; q + t < size.width; ++t) emit(q + t, sum[t]);
      }
    }
    if constexpr (with_moments) row.merge(size.width);
  }
}

template <int kernel, int stride, class T, class Scalar>
void convolve(Taps<Scalar> taps, const Scalar* weight, RowSize size, MapRow<T> y, RunningMoments<Scalar> moments) {
  with_tile<kHasFewColumns<kernel, T>>(size.width, [&](auto tile) {
    if (moments.values == nullptr)
      convolve_row<kernel, stride, tile.value, false>(taps, weight, size, y, moments);
    else
      convolve_row<kernel, stride, tile.value, true>(taps, weight, size, y, moments);
  });
}

// dh of one channel vector, [columns][lanes].
template <int kernel, int stride, class Scalar>
void data_gradient(const Taps<Scalar>& taps, int64_t strip_offset, const Scalar* weight, int64_t width, Scalar* dh) {
  constexpr int lanes = Compute<Scalar>::lanes;
  with_tile<kHasFewColumns<kernel, Scalar>>(stride == 1 ? width : (width + 1) / 2, [&](auto columns) {
    if constexpr (stride == 1) {
      constexpr int tile = columns.value;
      VectorOf<Scalar> sum[tile];
      for (int64_t q = 0; q < width; q += tile) {
        convolve_tile<kernel, 1>(taps, strip_offset, weight, q, sum);
#pragma GCC unroll 8
        for (int t = 0; t < tile; ++t) store(dh + (q + t) * lanes, sum[t]);
      }
    } else {
      constexpr int pairs = columns.value < kColumnPairs ? columns.value : kColumnPairs;
      VectorOf<Scalar> sum[2][pairs];
      for (int64_t pair = 0; 2 * pair < width; pair += pairs) {
        transposed_tile<kernel>(taps, strip_offset, weight, pair, sum);
#pragma GCC unroll 8
        for (int t = 0; t < pairs; ++t) {
          store(dh + 2 * (pair + t) * lanes, sum[0][t]);
          store(dh + (2 * (pair + t) + 1) * lanes, sum[1][t]);
        }
      }
    }
  });
}

// du = dh * act'(u), summed, and stored with residual_grad.
template <class T, class Scalar>
void finish_input_gradient(const Scalar* dh, RowSize size, int64_t vector, const InputGradient<T, Scalar>& to) {
  using Vector = VectorOf<Scalar>;
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t channels = size.channels, c = first_channel(vector, channels, lanes);
  with_activation(static_cast<Activation>(to.affine.activation), [&](auto activation) {
    const bool normalized = to.affine.scale != nullptr;
    const Vector scale = normalized ? load_first(to.affine.scale + c, channels) : Vector{} + 1;
    const Vector shift = normalized ? load_first(to.affine.shift + c, channels) : Vector{};
    const Vector center = to.center == nullptr ? Vector{} : load_first(to.center + c, channels);
    const bool reads_x = activation.value != Activation::identity || to.center != nullptr;
    const T* x = to.x.data + c;
    const T* residual = to.residual_grad.data == nullptr ? nullptr : to.residual_grad.data + c;
    Vector sum = {}, products = {};
    for (int64_t q = 0; q < size.width; ++q) {
      const Vector value = reads_x ? load_first(x + q * to.x.stride, channels) : Vector{};
      const Vector du = load(dh + q * lanes) * derivative<decltype(activation)::value>(value * scale + shift);
      if (to.grad_x.data != nullptr) {
        const Vector grad =
            residual == nullptr ? du : du + load_first(residual + q * to.residual_grad.stride, channels);
        store_first(to.grad_x.data + c + q * to.grad_x.stride, grad, channels);
      }
      sum += du;
      products += du * (value - center);
    }
    if (to.center != nullptr) {
      Scalar* sums = to.sums + vector * 2 * lanes;
      store(sums, load(sums) + sum);
      store(sums + lanes, load(sums + lanes) + products);
    }
  });
}

template <int kernel, int stride, class T, class Scalar>
void input_gradient(Taps<Scalar> taps, const Scalar* weight, RowSize size, const InputGradient<T, Scalar>& to,
                    Scalar* workspace) {
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t vectors = vectors_of(size.channels, lanes);
  if constexpr (stride == 1)  // dh is du, and leaves as a convolution's result does
    if (to.affine.activation == int(Activation::identity) && to.center == nullptr && to.residual_grad.data == nullptr)
      return convolve<kernel, 1, T, Scalar>(taps, weight, size, to.grad_x, {});
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t skipped = stride == 1 ? 0 : to.skipped;
    data_gradient<kernel, stride>(taps, v * taps.columns * lanes, weight + v * kernel * kernel * lanes,
                                  skipped + size.width, workspace);
    finish_input_gradient(workspace + skipped * lanes, size, v, to);
  }
}

template <int kernel, int stride, class Scalar>
void weight_gradient(Strip<Scalar> dy, Taps<Scalar> taps, RowSize size, Scalar* grad_weight) {
  constexpr int lanes = Compute<Scalar>::lanes;
  const int64_t vectors = vectors_of(size.channels, lanes);
  for (int64_t v = 0; v < vectors; ++v)
    weight_gradient_vector<kernel, stride>(dy.data + v * dy.columns * lanes, taps, v * taps.columns * lanes, size.width,
                                           grad_weight + v * kernel * kernel * lanes);
}

template <class Scalar>
void pack(const Scalar* from, int64_t channel_stride, int64_t row_stride, int64_t channels, int64_t rows,
          Scalar* packed) {
  constexpr int lanes = Compute<Scalar>::lanes;
  for (int64_t v = 0; v < vectors_of(channels, lanes); ++v) {
    const int64_t c = first_channel(v, channels, lanes);
    if (channel_stride == 1 && c + lanes <= channels) {
      for (int64_t row = 0; row < rows; ++row)
        store(packed + (v * rows + row) * lanes, load(from + c + row * row_stride));
      continue;
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < lanes; ++i)
        packed[(v * rows + row) * lanes + i] =
            c + i < channels ? from[(c + i) * channel_stride + row * row_stride] : Scalar(0);
  }
}

template <class Scalar>
void unpack(const Scalar* packed, int64_t channels, int64_t rows, Scalar* to, int64_t channel_stride,
            int64_t row_stride) {
  constexpr int lanes = Compute<Scalar>::lanes;
  for (int64_t v = 0; v < vectors_of(channels, lanes); ++v) {
    const int64_t c = first_channel(v, channels, lanes);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < lanes && c + i < channels; ++i)
        to[(c + i) * channel_stride + row * row_stride] = packed[(v * rows + row) * lanes + i];
  }
}

template <class T, class Scalar = typename Compute<T>::Scalar>
constexpr DepthwiseKernels<T, Scalar> kernels = {
    Compute<Scalar>::lanes,
    activate_row<T, Scalar>,
    output_gradient<T, Scalar>,
    {{convolve<3, 1, T, Scalar>, convolve<3, 2, T, Scalar>},
     {convolve<5, 1, T, Scalar>, convolve<5, 2, T, Scalar>},
     {convolve<7, 1, T, Scalar>, convolve<7, 2, T, Scalar>}},
    {{input_gradient<3, 1, T, Scalar>, input_gradient<3, 2, T, Scalar>},
     {input_gradient<5, 1, T, Scalar>, input_gradient<5, 2, T, Scalar>},
     {input_gradient<7, 1, T, Scalar>, input_gradient<7, 2, T, Scalar>}},
    {{weight_gradient<3, 1, Scalar>, weight_gradient<3, 2, Scalar>},
     {weight_gradient<5, 1, Scalar>, weight_gradient<5, 2, Scalar>},
     {weight_gradient<7, 1, Scalar>, weight_gradient<7, 2, Scalar>}},
    pack<Scalar>,
    unpack<Scalar>,
};

}  // namespace

extern const DepthwiseTables depthwise_tables;
const DepthwiseTables depthwise_tables = {kernels<float>, kernels<double>, kernels<Float16>, kernels<BFloat16>};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
