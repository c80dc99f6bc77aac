#include "squeeze_excite_simd.h"

#include "../simd/activation.h"
#include "../simd/vector.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

// What fits into the registers beside the operands: 32 of them with avx512, 16 before.
constexpr int kRowBlock = 4;
constexpr int kVectorBlock = BIASLOSS_VECTOR_BYTES == 64 ? 4 : 2;

template <int count>
struct Block {
  static constexpr int value = count;
};

// The first `count` values, fewer than a vector; zeros behind them.
template <class V, class T>
inline V load_first(const T* from, int64_t count) {
  constexpr int lanes = Compute<T>::lanes;
  T padded[lanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

// The sums of four vectors at once, a tenth of the instructions of four horizontal sums.
inline void store_sums(float* out, const float* bias, const FloatVector* four) {
  typedef float Quad __attribute__((vector_size(16)));
  typedef int32_t Index __attribute__((vector_size(16)));
  constexpr int quads = kFloatLanes / 4;
  Quad q[4];
  for (int i = 0; i < 4; ++i) {
    Quad parts[quads];
    __builtin_memcpy(parts, &four[i], sizeof(parts));
    q[i] = parts[0];
    for (int j = 1; j < quads; ++j) q[i] += parts[j];
  }
  const Index even = {0, 2, 4, 6}, odd = {1, 3, 5, 7};
  const Quad low = __builtin_shuffle(q[0], q[1], even) + __builtin_shuffle(q[0], q[1], odd);
  const Quad high = __builtin_shuffle(q[2], q[3], even) + __builtin_shuffle(q[2], q[3], odd);
  const Quad sums = __builtin_shuffle(low, high, even) + __builtin_shuffle(low, high, odd);
  store(out, load_bytes<Quad>(bias) + sums);
}
inline void store_sums(double* out, const double* bias, const DoubleVector* four) {
  for (int i = 0; i < 4; ++i) out[i] = bias[i] + horizontal_sum(four[i]);
}

template <int rows, int outputs, class T>
inline void linear_block(const T* x, int64_t depth, const T* weight, const T* bias, T* out, int64_t width) {
  using V = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  V sum[rows][outputs] = {};
  const auto add = [&](const auto& load_at) {
    V w[outputs];
    for (int n = 0; n < outputs; ++n) w[n] = load_at(weight + n * depth);
    for (int m = 0; m < rows; ++m) {
      const V value = load_at(x + m * depth);
      for (int n = 0; n < outputs; ++n) sum[m][n] += value * w[n];
    }
  };
  int64_t k = 0;
  for (; k + lanes <= depth; k += lanes) add([&](const T* row) { return load(row + k); });
  if (k < depth && k > 0)  // the last vector overlaps the one before it, of which zeros are left
    add([&](const T* row) { return keep_last(load(row + depth - lanes), depth - k, T(0)); });
  else if (k < depth)
    add([&](const T* row) { return load_first<V>(row, depth); });
  for (int m = 0; m < rows; ++m) {
    if constexpr (outputs == 4)
      store_sums(out + m * width, bias, sum[m]);
    else
      for (int n = 0; n < outputs; ++n) out[m * width + n] = bias[n] + horizontal_sum(sum[m][n]);
  }
}

template <class T>
void linear(Rows<const T> x, int64_t rows, const T* weight, const T* bias, int64_t begin, int64_t end, Rows<T> out) {
  const int64_t depth = x.stride, width = out.stride;
  const auto columns = [&](int64_t m, auto row_block) {
    constexpr int count = row_block.value;
    const T* const x_row = x.data + m * depth;
    T* const out_row = out.data + m * width;
    int64_t n = begin;
    for (; n + kRowBlock <= end; n += kRowBlock)
      linear_block<count, kRowBlock>(x_row, depth, weight + n * depth, bias + n, out_row + n, width);
    for (; n < end; ++n) linear_block<count, 1>(x_row, depth, weight + n * depth, bias + n, out_row + n, width);
  };
  int64_t m = 0;
  for (; m + kVectorBlock <= rows; m += kVectorBlock) columns(m, Block<kVectorBlock>());
  for (; m < rows; ++m) columns(m, Block<1>());
}

template <int rows, int vectors, class T>
inline void combine_block(Strided<T> a, int64_t depth, const T* b, Rows<T> out) {
  using V = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  V sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V values[vectors];
    for (int v = 0; v < vectors; ++v) values[v] = load(b + k * out.stride + v * lanes);
    for (int m = 0; m < rows; ++m) {
      const V factor = V{} + a.data[m * a.row_stride + k * a.column_stride];
      for (int v = 0; v < vectors; ++v) sum[m][v] += factor * values[v];
    }
  }
  for (int m = 0; m < rows; ++m)
    for (int v = 0; v < vectors; ++v) store(out.data + m * out.stride + v * lanes, sum[m][v]);
}

// For end - begin >= lanes: the last vector may overlap the one before it.
template <int rows, class T>
void combine_rows(Strided<T> a, int64_t depth, const T* b, int64_t begin, int64_t end, Rows<T> out) {
  constexpr int lanes = Compute<T>::lanes;
  int64_t n = begin;
  for (; n + kVectorBlock * lanes <= end; n += kVectorBlock * lanes)
    combine_block<rows, kVectorBlock>(a, depth, b + n, Rows<T>{out.data + n, out.stride});
  for (; n < end; n += lanes) {
    if (n + lanes > end) n = end - lanes;
    combine_block<rows, 1>(a, depth, b + n, Rows<T>{out.data + n, out.stride});
  }
}

template <class T>
void combine(Strided<T> a, int64_t rows, int64_t depth, const T* b, int64_t begin, int64_t end, Rows<T> out) {
  constexpr int lanes = Compute<T>::lanes;
  if (end - begin < lanes) {  // narrower than a vector
    for (int64_t m = 0; m < rows; ++m) {
      typename Compute<T>::Vector sum = {};
      for (int64_t k = 0; k < depth; ++k)
        sum += a.data[m * a.row_stride + k * a.column_stride] *
               load_first<typename Compute<T>::Vector>(b + k * out.stride + begin, end - begin);
      for (int64_t n = begin; n < end; ++n) out.data[m * out.stride + n] = sum[n - begin];
    }
    return;
  }
  const auto from_row = [&](int64_t m, auto combine_some) {
    combine_some(Strided<T>{a.data + m * a.row_stride, a.row_stride, a.column_stride}, depth, b, begin, end,
                 Rows<T>{out.data + m * out.stride, out.stride});
  };
  int64_t m = 0;
  for (; m + kRowBlock <= rows; m += kRowBlock) from_row(m, combine_rows<kRowBlock, T>);
  for (; m < rows; ++m) from_row(m, combine_rows<1, T>);
}

// Calls f(load, store) for every vector of `count` values and for what is left of them.
template <class T, class F>
void for_all(int64_t count, T* out, const F& f) {
  using V = typename Compute<T>::Vector;
  constexpr int lanes = Compute<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(out + i, f([&](const T* from) { return load(from + i); }));
  if (i == count) return;
  const V last = f([&](const T* from) { return load_first<V>(from + i, count - i); });
  for (int64_t j = i; j < count; ++j) out[j] = last[j - i];
}

template <class T>
void activate_all(Activation activation, const T* u, int64_t count, T* h) {
  with_activation(activation, [&](auto constant) {
    for_all(count, h, [&](const auto& get) { return activate<constant.value>(get(u)); });
  });
}

template <class T>
void gradient(Activation activation, const T* grad, const T* u, int64_t count, T* out) {
  with_activation(activation, [&](auto constant) {
    for_all(count, out, [&](const auto& get) { return get(grad) * derivative<constant.value>(get(u)); });
  });
}

template <class T>
constexpr SqueezeExciteTable<T> table() {
  return {linear<T>, combine<T>, activate_all<T>, gradient<T>};
}

}  // namespace

extern const SqueezeExciteTables squeeze_excite_tables;
const SqueezeExciteTables squeeze_excite_tables = {table<float>(), table<double>()};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
