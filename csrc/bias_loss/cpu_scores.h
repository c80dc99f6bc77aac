// Scores, targets and gradients of any dtype and strides, handed to the row kernels as contiguous rows of Scalar.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lanes_simd.h"
#include "rows_simd.h"

namespace biasloss {

// (N, K) or (N, K, S); a row is the K scores of one position. Scalar is double for float64 tensors and float for all
// others.
class ScoreTensor {
 public:
  using ScalarType = torch::headeronly::ScalarType;

  explicit ScoreTensor(const torch::stable::Tensor& t)
      : data_(static_cast<char*>(t.data_ptr())),
        dtype_(t.scalar_type()),
        samples(t.size(0)),
        classes(t.size(1)),
        positions(t.dim() > 2 ? t.size(2) : 1),
        sample_stride_(t.stride(0)),
        class_stride_(t.stride(1)),
        position_stride_(t.dim() > 2 ? t.stride(2) : 0) {}

  // The row itself where it lies ready, a copy in `scratch` otherwise.
  template <class Scalar>
  const Scalar* read(int64_t row, Scalar* scratch) const {
    const int64_t offset = offset_of(row);
    if constexpr (std::is_same_v<Scalar, float>) {
      if (dtype_ == ScalarType::Half || dtype_ == ScalarType::BFloat16) {
        if (dtype_ == ScalarType::Half)
          row_tables().widen_float16(at<Float16>(offset, 2), class_stride_, classes, scratch);
        else
          row_tables().widen_bfloat16(at<BFloat16>(offset, 2), class_stride_, classes, scratch);
        return scratch;
      }
    }
    const Scalar* from = at<Scalar>(offset, sizeof(Scalar));
    if (class_stride_ == 1) return from;
    for (int64_t k = 0; k < classes; ++k) scratch[k] = from[k * class_stride_];
    return scratch;
  }

  // Where the row kernel may write its result: in place, or in `scratch` to be handed to write().
  template <class Scalar>
  Scalar* destination(int64_t row, Scalar* scratch) const {
    return in_place<Scalar>() ? at<Scalar>(offset_of(row), sizeof(Scalar)) : scratch;
  }

  template <class Scalar>
  void write(int64_t row, const Scalar* values) const {
    if (in_place<Scalar>()) return;
    const int64_t offset = offset_of(row);
    if constexpr (std::is_same_v<Scalar, float>) {
      if (dtype_ == ScalarType::Half)
        return row_tables().narrow_float16(values, classes, at<Float16>(offset, 2), class_stride_);
      if (dtype_ == ScalarType::BFloat16)
        return row_tables().narrow_bfloat16(values, classes, at<BFloat16>(offset, 2), class_stride_);
    }
    Scalar* to = at<Scalar>(offset, sizeof(Scalar));
    for (int64_t k = 0; k < classes; ++k) to[k * class_stride_] = values[k];
  }

  int64_t rows() const { return samples * positions; }

  // Whether rows are better taken side by side, as lanes: their scores lie side by side, or there are so few that
  // `few_classes` says that they leave vectors empty.
  bool prefers_lanes(int64_t few_classes) const {
    constexpr int64_t few_rows = 8;
    const bool side_by_side = row_stride() == 1 && (positions == 1 ? samples : positions) >= few_rows;
    return classes <= few_classes || (class_stride_ != 1 && side_by_side);
  }
  // Rows of a block of lanes: no more than stay in cache.
  int64_t lanes() const { return classes <= 512 ? 64 : classes <= 2048 ? 32 : 16; }
  // The end of the rows behind `row` that lie at a fixed distance from each other.
  int64_t end_of_run(int64_t row) const { return positions == 1 ? samples : (row / positions + 1) * positions; }

  // `count` rows of one run as (classes, width); `spare` has room for as much.
  template <class Scalar>
  void load_lanes(int64_t row, int64_t count, Scalar* to, int64_t width, Scalar* spare) const {
    const RowBlock block = {count, classes, row_stride(), class_stride_};
    const int64_t offset = offset_of(row);
    if constexpr (std::is_same_v<Scalar, float>) {
      if (dtype_ == ScalarType::Half)
        return lane_tables().load_float16(at<Float16>(offset, 2), block, to, width, spare);
      if (dtype_ == ScalarType::BFloat16)
        return lane_tables().load_bfloat16(at<BFloat16>(offset, 2), block, to, width, spare);
    }
    lane_tables().of(Scalar()).load(at<Scalar>(offset, sizeof(Scalar)), block, to, width, spare);
  }

  template <class Scalar>
  void store_lanes(int64_t row, int64_t count, const Scalar* from, int64_t width, Scalar* spare) const {
    const RowBlock block = {count, classes, row_stride(), class_stride_};
    const int64_t offset = offset_of(row);
    if constexpr (std::is_same_v<Scalar, float>) {
      if (dtype_ == ScalarType::Half)
        return lane_tables().store_float16(from, width, block, at<Float16>(offset, 2), spare);
      if (dtype_ == ScalarType::BFloat16)
        return lane_tables().store_bfloat16(from, width, block, at<BFloat16>(offset, 2), spare);
    }
    lane_tables().of(Scalar()).store(from, width, block, at<Scalar>(offset, sizeof(Scalar)), spare);
  }

 private:
  char* data_;
  ScalarType dtype_;

 public:
  const int64_t samples, classes, positions;

 private:
  int64_t sample_stride_, class_stride_, position_stride_;

  int64_t row_stride() const { return positions == 1 ? sample_stride_ : position_stride_; }

  int64_t offset_of(int64_t row) const { return row / positions * sample_stride_ + row % positions * position_stride_; }

  template <class T>
  T* at(int64_t offset, int64_t element_size) const {
    return reinterpret_cast<T*>(data_ + offset * element_size);
  }

  template <class Scalar>
  bool in_place() const {
    const bool same = dtype_ == (std::is_same_v<Scalar, float> ? ScalarType::Float : ScalarType::Double);
    return same && class_stride_ == 1;
  }
};

struct RowClass {
  int64_t row, value;
};

// Class targets, one a row.
class ClassTargets {
 public:
  explicit ClassTargets(const torch::stable::Tensor& t)
      : dense_(t.is_contiguous() ? t : torch::stable::contiguous(t)),
        data_(dense_.const_data_ptr()),
        dtype_(t.scalar_type()) {}

  // Those of `count` rows, at most 64, each read once: -1 for what is ignored or invalid. Returns the first invalid
  // one.
  RowClass read(int64_t first, int64_t count, int64_t classes, int64_t ignore_index, int32_t* to,
                int64_t* counted) const {
    int64_t own[64];
    switch (dtype_) {
      case torch::headeronly::ScalarType::Long:
        std::copy_n(static_cast<const int64_t*>(data_) + first, count, own);
        break;
      case torch::headeronly::ScalarType::Int:
        std::copy_n(static_cast<const int32_t*>(data_) + first, count, own);
        break;
      default:
        std::copy_n(static_cast<const uint8_t*>(data_) + first, count, own);
    }
    // The memory may change meanwhile; the compiler must not go back to it.
    asm volatile("" : : "r"(own) : "memory");
    std::fill(own + count, own + 64, ignore_index);
    if (lane_tables().labels(own, count, classes, ignore_index, to, counted)) return {-1, 0};
    const int64_t i =
        std::find_if(own, own + count,
                     [&](int64_t value) { return (value < 0 || value >= classes) && value != ignore_index; }) -
        own;
    return {first + i, own[i]};
  }

  int64_t operator[](int64_t row) const {
    switch (dtype_) {
      case torch::headeronly::ScalarType::Long:
        return static_cast<const int64_t*>(data_)[row];
      case torch::headeronly::ScalarType::Int:
        return static_cast<const int32_t*>(data_)[row];
      default:
        return static_cast<const uint8_t*>(data_)[row];
    }
  }

 private:
  torch::stable::Tensor dense_;
  const void* data_;
  torch::headeronly::ScalarType dtype_;
};

}  // namespace biasloss
