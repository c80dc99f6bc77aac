#include "lanes_simd.h"

#include <math.h>

#include "../math/weight_formula.h"
#include "../simd/narrow.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

template <class Scalar>
using Vector = typename Compute<Scalar>::Vector;

// Sums of float32 run over this many terms, then into a sum of sums: the error does not grow with the classes.
constexpr int64_t kTermsOfSum = 32;

// Up to so many a class is found by comparing, not by its address: what was stored as scalars loads slowly as a vector.
constexpr int64_t kFewClasses = 8;

inline IntVector labels_at(const int32_t* label, float) { return load_bytes<IntVector>(label); }
inline LongVector labels_at(const int32_t* label, double) {
  LongVector wide;
  for (int i = 0; i < kDoubleLanes; ++i) wide[i] = label[i];
  return wide;
}
inline int32_t index_of(int64_t k, float) { return static_cast<int32_t>(k); }
inline int64_t index_of(int64_t k, double) { return k; }

// log of values of at least 1, within 1.5 ulp; NaN stays. x = 2^e m with m in [sqrt(1/2), sqrt(2)).
inline FloatVector logarithm(FloatVector x) {
  const IntVector bits = bits_as<IntVector>(x);
  const IntVector e = (bits - 0x3f3504f3) >> 23;
  const FloatVector f = bits_as<FloatVector>(bits - (e << 23)) - 1.0f;
  FloatVector p = FloatVector{} + 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const FloatVector square = f * f, n = __builtin_convertvector(e, FloatVector);
  const FloatVector result = (square * f * p + n * -2.12194440e-4f - 0.5f * square) + f + n * 0.693359375f;
  return x == x ? result : x;
}
inline DoubleVector logarithm(DoubleVector x) {
  for (int i = 0; i < kDoubleLanes; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// Calls f(lane) for the first lane of every vector that holds rows.
template <class Scalar, class F>
inline void for_lanes(int64_t rows, const F& f) {
  for (int64_t lane = 0; lane < rows; lane += Compute<Scalar>::lanes) f(lane);
}

// The sum of term(k) over all classes.
template <class Scalar, class Term>
inline Vector<Scalar> sum_over_classes(int64_t classes, const Term& term) {
  Vector<Scalar> total = {};
  for (int64_t begin = 0; begin < classes; begin += kTermsOfSum) {
    const int64_t end = begin + kTermsOfSum < classes ? begin + kTermsOfSum : classes;
    Vector<Scalar> sum = {};
    for (int64_t k = begin; k < end; ++k) sum += term(k);
    total += sum;
  }
  return total;
}

template <class Scalar>
void max_and_log_sum(const Scalar* x, int64_t classes, int64_t width, int64_t rows, LaneRows<Scalar>* of) {
  for_lanes<Scalar>(rows, [&](int64_t lane) {
    const Scalar* from = x + lane;
    Vector<Scalar> largest = load(from);
    for (int64_t k = 1; k < classes; ++k) largest = maximum(load(from + k * width), largest);
    // The largest scores are counted, so that their ones swallow none of the small terms: where one score is far above
    // the others, those are all of the loss. What the last addition rounds off is a term of the logarithm's.
    const Vector<Scalar> none = {}, one = none + Scalar(1);
    Vector<Scalar> ones = none;
    const auto rest = sum_over_classes<Scalar>(classes, [&](int64_t k) {
      const auto gap = load(from + k * width) - largest;
      const auto is_largest = gap == none;
      ones += is_largest ? one : none;
      return is_largest ? none : exponential(gap);
    });
    const auto sum = ones + rest, added = sum - ones;
    const auto lost = (ones - (sum - added)) + (rest - added);
    store(of->max + lane, largest);
    store(of->log_sum + lane, logarithm(sum) + lost / sum);
  });
}

template <class Scalar>
void hard_loss(const Scalar* x, int64_t classes, int64_t width, int64_t rows, LaneRows<Scalar>* of) {
  for_lanes<Scalar>(rows, [&](int64_t lane) {
    const auto label = labels_at(of->label + lane, Scalar());
    Vector<Scalar> score = {};
    if (classes <= kFewClasses) {
      for (int64_t k = 0; k < classes; ++k) score = label == index_of(k, Scalar()) ? load(x + k * width + lane) : score;
    } else {
      for (int i = 0; i < Compute<Scalar>::lanes; ++i)
        if (of->label[lane + i] >= 0) score[i] = x[of->label[lane + i] * width + lane + i];
    }
    const auto loss = load(of->log_sum + lane) - (score - load(of->max + lane));
    store(of->loss + lane, label >= index_of(0, Scalar()) ? loss : Vector<Scalar>{});
  });
}

// Sums with the rounding errors of every addition: one large term must not swallow many small ones.
template <class Scalar>
void soft_loss(const Scalar* x, const Scalar* q, int64_t classes, int64_t width, int64_t rows, LaneRows<Scalar>* of) {
  for_lanes<Scalar>(rows, [&](int64_t lane) {
    const auto max = load(of->max + lane), log_sum = load(of->log_sum + lane);
    Vector<Scalar> sum = {}, lost = {};
    for (int64_t k = 0; k < classes; ++k) {
      const auto term = load(q + k * width + lane) * (log_sum - (load(x + k * width + lane) - max));
      const auto next = sum + term, added = next - sum;
      lost += (sum - (next - added)) + (term - added);
      sum = next;
    }
    const auto exact = sum + lost;
    const auto loss = exact == exact ? exact : sum;  // infinite terms leave a NaN as their error
    store(of->loss + lane, labels_at(of->label + lane, Scalar()) >= index_of(0, Scalar()) ? loss : Vector<Scalar>{});
  });
}

template <class Scalar>
void hard_gradient(Scalar* x, int64_t classes, int64_t width, const LaneRows<Scalar>& of, int64_t rows) {
  for_lanes<Scalar>(rows, [&](int64_t lane) {
    const auto max = load(of.max + lane), log_sum = load(of.log_sum + lane), scale = load(of.scale + lane);
    const auto label = labels_at(of.label + lane, Scalar());
    const auto counts = label >= index_of(0, Scalar());
    const Vector<Scalar> none = {};
    Vector<Scalar> of_target = none;
    const auto others = sum_over_classes<Scalar>(classes, [&](int64_t k) {
      Scalar* at = x + k * width + lane;
      const auto is_target = label == index_of(k, Scalar());
      const auto p = exponential((load(at) - max) - log_sum);
      store(at, counts ? p * scale : none);
      of_target = is_target ? p : of_target;
      return is_target ? none : p;
    });
    // p - 1, as the negated sum of all others where it would cancel: exact for a confident prediction.
    const auto rest = of_target > Scalar(0.5) ? -others : of_target - Scalar(1);
    const auto gradient = rest * scale;
    if (classes <= kFewClasses) {
      for (int64_t k = 0; k < classes; ++k) {
        Scalar* at = x + k * width + lane;
        store(at, label == index_of(k, Scalar()) ? gradient : load(at));
      }
      return;
    }
    Scalar of_lanes[Compute<Scalar>::lanes];
    store(of_lanes, gradient);
    for (int i = 0; i < Compute<Scalar>::lanes; ++i)
      if (of.label[lane + i] >= 0) x[of.label[lane + i] * width + lane + i] = of_lanes[i];
  });
}

template <class Scalar>
void soft_gradient(Scalar* x, const Scalar* q, int64_t classes, int64_t width, const LaneRows<Scalar>& of,
                   int64_t rows) {
  for_lanes<Scalar>(rows, [&](int64_t lane) {
    const auto max = load(of.max + lane), log_sum = load(of.log_sum + lane), scale = load(of.scale + lane);
    const auto total = load(of.total + lane);
    const auto counts = labels_at(of.label + lane, Scalar()) >= index_of(0, Scalar());
    const Vector<Scalar> none = {};
    for (int64_t k = 0; k < classes; ++k) {
      Scalar* at = x + k * width + lane;
      const auto g = (exponential((load(at) - max) - log_sum) * total - load(q + k * width + lane)) * scale;
      store(at, counts ? g : none);
    }
  });
}

// Rows side by side, (classes, rows) with row_stride 1.
template <class T, class Scalar>
void load_lines(const T* from, const RowBlock& block, Scalar* to, int64_t width) {
  for (int64_t k = 0; k < block.classes; ++k, from += block.class_stride, to += width) {
    for (int64_t r = 0; r < block.rows; r += Compute<T>::lanes) store(to + r, load_first(from + r, block.rows - r));
    // The next block's part of this line: too far from the last for the processor to foresee.
    constexpr int64_t values_of_line = 64 / sizeof(T);
    for (int64_t r = 0; r < block.rows; r += values_of_line) __builtin_prefetch(from + block.rows + r);
  }
}

template <class T, class Scalar>
void store_lines(const Scalar* from, int64_t width, const RowBlock& block, T* to) {
  for (int64_t k = 0; k < block.classes; ++k, from += width, to += block.class_stride)
    for (int64_t r = 0; r < block.rows; r += Compute<T>::lanes) store_first(to + r, load(from + r), block.rows - r);
}

// The lanes behind the rows, up to a whole vector, are computed as well.
template <class Scalar>
void clear_rest(const RowBlock& block, Scalar* to, int64_t width) {
  const int64_t rest = (width - block.rows) % Compute<Scalar>::lanes;
  for (int64_t k = 0; rest > 0 && k < block.classes; ++k)
    for (int64_t r = 0; r < rest; ++r) to[k * width + block.rows + r] = 0;
}

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadOrder __attribute__((vector_size(16)));

// (4, 4) from lines `from_stride` apart to lines `to_stride` apart, transposed.
inline void transpose_quad(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const auto a = load_bytes<Quad>(from), b = load_bytes<Quad>(from + from_stride),
             c = load_bytes<Quad>(from + 2 * from_stride), d = load_bytes<Quad>(from + 3 * from_stride);
  const QuadOrder low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  const Quad ab = __builtin_shuffle(a, b, low), cd = __builtin_shuffle(c, d, low);
  const Quad ab_high = __builtin_shuffle(a, b, high), cd_high = __builtin_shuffle(c, d, high);
  store(to, __builtin_shuffle(ab, cd, first));
  store(to + to_stride, __builtin_shuffle(ab, cd, second));
  store(to + 2 * to_stride, __builtin_shuffle(ab_high, cd_high, first));
  store(to + 3 * to_stride, __builtin_shuffle(ab_high, cd_high, second));
}

// (lines, columns) to (columns, lines): squares, the last of which overlap those before them.
inline void transpose_squares(const float* from, int64_t from_stride, int64_t lines, int64_t columns, float* to,
                              int64_t to_stride) {
  for (int64_t line = 0; line < lines; line += 4) {
    const int64_t i = line + 4 <= lines ? line : lines - 4;
    for (int64_t column = 0; column < columns; column += 4) {
      const int64_t j = column + 4 <= columns ? column : columns - 4;
      transpose_quad(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
}

// Whether a block can be transposed in squares.
template <class Scalar>
bool has_squares(const RowBlock& block) {
  return sizeof(Scalar) == sizeof(float) && block.class_stride == 1 && block.rows >= 4 && block.classes >= 4;
}

template <class Scalar>
void transpose_in(const Scalar* from, const RowBlock& block, Scalar* to, int64_t width) {
  if (!has_squares<Scalar>(block)) {
    for (int64_t k = 0; k < block.classes; ++k)
      for (int64_t r = 0; r < block.rows; ++r) to[k * width + r] = from[r * block.row_stride + k * block.class_stride];
  } else if constexpr (sizeof(Scalar) == sizeof(float)) {
    transpose_squares(from, block.row_stride, block.rows, block.classes, to, width);
  }
  clear_rest(block, to, width);
}

template <class Scalar>
void transpose_out(const Scalar* from, int64_t width, const RowBlock& block, Scalar* to) {
  if (!has_squares<Scalar>(block)) {
    for (int64_t k = 0; k < block.classes; ++k)
      for (int64_t r = 0; r < block.rows; ++r) to[r * block.row_stride + k * block.class_stride] = from[k * width + r];
  } else if constexpr (sizeof(Scalar) == sizeof(float)) {
    transpose_squares(from, width, block.classes, block.rows, to, block.row_stride);
  }
}

bool is_one_run(const RowBlock& block) { return block.class_stride == 1 && block.row_stride == block.classes; }

template <class T, class Scalar>
void load_block(const T* from, const RowBlock& block, Scalar* to, int64_t width, Scalar* spare) {
  if (block.row_stride == 1) return load_lines(from, block, to, width);
  if constexpr (sizeof(T) == sizeof(Scalar)) {
    transpose_in(from, block, to, width);
  } else if (is_one_run(block)) {
    const int64_t count = block.rows * block.classes;
    for (int64_t i = 0; i < count; i += kFloatLanes) store_first(spare + i, load_first(from + i, count - i), count - i);
    transpose_in(static_cast<const Scalar*>(spare), block, to, width);
  } else {
    for (int64_t r = 0; r < block.rows; ++r)
      for (int64_t k = 0; k < block.classes; ++k)
        to[k * width + r] = to_compute(from[r * block.row_stride + k * block.class_stride]);
    clear_rest(block, to, width);
  }
}

template <class T, class Scalar>
void store_block(const Scalar* from, int64_t width, const RowBlock& block, T* to, Scalar* spare) {
  if (block.row_stride == 1) return store_lines(from, width, block, to);
  if constexpr (sizeof(T) == sizeof(Scalar)) {
    transpose_out(from, width, block, to);
  } else if (is_one_run(block)) {
    const int64_t count = block.rows * block.classes;
    transpose_out(from, width, block, spare);
    for (int64_t i = 0; i < count; i += kFloatLanes) store_first(to + i, load_first(spare + i, count - i), count - i);
  } else {
    for (int64_t r = 0; r < block.rows; ++r)
      for (int64_t k = 0; k < block.classes; ++k)
        from_compute(from[k * width + r], to + r * block.row_stride + k * block.class_stride);
  }
}

// As bias_weight() in csrc/math/bias_weight.h, where `range` is not 0.
template <class Scalar>
void weigh(Scalar* weight, int64_t count, Scalar low, Scalar range, Scalar alpha, Scalar beta) {
  for (int64_t i = 0; i < count; i += Compute<Scalar>::lanes) {
    const Vector<Scalar> normalized = (load_first(weight + i, count - i) - low) / range;
    const auto of_vector = [](const Vector<Scalar>& x) { return exponential(x); };
    store_first(weight + i, weight_formula(normalized, alpha, beta, of_vector), count - i);
  }
}

template <class Scalar>
double sum_of(const Scalar* values, int64_t count) {
  double chains[4] = {};  // of additions, side by side
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int j = 0; j < 4; ++j) chains[j] += double(values[i + j]);
  for (; i < count; ++i) chains[0] += double(values[i]);
  return chains[0] + chains[1] + (chains[2] + chains[3]);
}

typedef int32_t HalfIntVector __attribute__((vector_size(BIASLOSS_VECTOR_BYTES / 2)));

bool labels_of(const int64_t* classes_of_rows, int64_t count, int64_t classes, int64_t ignore_index, int32_t* label,
               int64_t* counted) {
  LongVector all_known = ~LongVector{}, counts = {};
  for (int64_t i = 0; i < count; i += kDoubleLanes) {
    const auto value = load_bytes<LongVector>(classes_of_rows + i);
    const LongVector valid = (value >= 0) & (value < classes), ignored = value == ignore_index;
    const LongVector code = (valid & ~ignored) ? value : LongVector{} - 1;
    all_known &= valid | ignored;
    counts += code < 0;  // -1 for each
    store(label + i, __builtin_convertvector(code, HalfIntVector));
  }
  bool known = true;
  *counted = (count + kDoubleLanes - 1) / kDoubleLanes * kDoubleLanes;
  for (int i = 0; i < kDoubleLanes; ++i) known = known && all_known[i] != 0, *counted += counts[i];
  return known;
}

template <class Scalar>
constexpr LaneTable<Scalar> lane_table() {
  return {max_and_log_sum<Scalar>,     hard_loss<Scalar>,     soft_loss<Scalar>,
          hard_gradient<Scalar>,       soft_gradient<Scalar>, load_block<Scalar, Scalar>,
          store_block<Scalar, Scalar>, weigh<Scalar>,         sum_of<Scalar>};
}

}  // namespace

extern const LaneTables lane_tables;
const LaneTables lane_tables = {lane_table<float>(),
                                lane_table<double>(),
                                load_block<Float16, float>,
                                load_block<BFloat16, float>,
                                store_block<Float16, float>,
                                store_block<BFloat16, float>,
                                labels_of};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
