// The weight of a 1x1 convolution as the kernels read it: a matrix whose rows hold whole vectors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../cpu/maps.h"
#include "../cpu/parallel.h"
#include "../simd/padding.h"

namespace biasloss {

// Whether a weight is (vectors, C, lanes): Layout::vectors of csrc/simd/gemm.h, for the vectors of this CPU. So
// programs keep theirs, of maps of float32 or float64: what a product reads next lies behind what it reads, which the
// CPU foresees.
inline bool is_by_vectors(const Tensor& weight) { return weight.dim() == 3; }

// weight (K, C, 1, 1) as (C, K) or, where `by_output`, as (K, C). Read where it lies if its rows hold whole vectors (of
// `vector_bytes`), as they do in a view of a padded (C, K) or (K, C) matrix; packed into a copy otherwise.
template <class Scalar>
class PackedWeight {
 public:
  template <class Pack>
  PackedWeight(const Tensor& weight, bool by_output, int64_t vector_bytes, Pack pack) {
    const int64_t outputs = weight.size(0), channels = weight.size(1);
    const int64_t rows = by_output ? outputs : channels, columns = by_output ? channels : outputs;
    const int64_t row_stride = weight.stride(by_output ? 0 : 1), column_stride = weight.stride(by_output ? 1 : 0);
    data = static_cast<const Scalar*>(weight.const_data_ptr());
    stride = row_stride;
    if ((column_stride == 1 || columns == 1) && holds_vectors(weight, rows, columns, row_stride, vector_bytes)) return;
    stride = buffer_stride<Scalar>(columns);
    copy_ = empty_tensor({rows, stride}, weight.scalar_type());
    auto* to = static_cast<Scalar*>(copy_->mutable_data_ptr());
    constexpr int64_t kRows = 16;  // of a square that is transposed at once, or several
    const int64_t blocks = (rows + kRows - 1) / kRows;
    parallel_shares(rows * columns, [&](int64_t share, int64_t shares) {
      const int64_t first = blocks * share / shares * kRows;
      const int64_t count = std::min(rows, blocks * (share + 1) / shares * kRows) - first;
      if (count > 0)
        pack(count, columns, data + first * row_stride, row_stride, column_stride, to + first * stride, stride);
    });
    data = to;
  }

  // A weight by vectors of a map of `dtype`.
  PackedWeight(const Tensor& weight, int64_t channels, int64_t outputs, ScalarType dtype, int64_t vector_bytes)
      : data(static_cast<const Scalar*>(weight.const_data_ptr())), by_vectors(true) {
    const int64_t lanes = vector_bytes / int64_t(sizeof(Scalar)), vectors = (outputs + lanes - 1) / lanes;
    STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == vectors && weight.size(1) == channels &&
                        weight.size(2) == lanes && weight.is_contiguous(),
                    "weight: expected a contiguous (", vectors, ", ", channels, ", ", lanes, ")");
    STD_TORCH_CHECK(weight.scalar_type() == dtype && dtype == dtype_of<Scalar>,
                    "weight: expected float32 or float64, as the map");
    stride = channels * lanes;
  }

  // Of the columns from `column` on, which begin a vector.
  const Scalar* from(int64_t column, int64_t lanes) const {
    return data + (by_vectors ? column / lanes * stride : column);
  }

  const Scalar* data;
  int64_t stride;  // from one row to the next or, by vectors, from one vector to the next
  bool by_vectors = false;

 private:
  static bool holds_vectors(const Tensor& weight, int64_t rows, int64_t columns, int64_t row_stride,
                            int64_t vector_bytes) {
    const int64_t lanes = vector_bytes / int64_t(sizeof(Scalar)), vectors = (columns + lanes - 1) / lanes;
    if (row_stride % lanes != 0 || row_stride < vectors * lanes) return false;
    int64_t bytes = 0;
    STD_TORCH_CHECK(aoti_torch_get_storage_size(weight.get(), &bytes) == 0, "weight has no storage");
    const int64_t last = weight.storage_offset() + (rows - 1) * row_stride + vectors * lanes;
    return last * int64_t(sizeof(Scalar)) <= bytes;
  }

  std::optional<Tensor> copy_;
};

// Raises unless weight is (K, C, 1, 1) for maps of C channels, in the accumulation dtype.
inline void check_weight(const Tensor& weight, int64_t channels, ScalarType dtype) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 1 && weight.size(3) == 1,
                  "weight: expected shape (K, ", channels, ", 1, 1) for a map of ", channels, " channels");
  STD_TORCH_CHECK(weight.size(0) >= 1 && channels >= 1,
                  "weight: expected at least one output and one input channel, got ", weight.size(0), " and ",
                  channels);
  STD_TORCH_CHECK(weight.scalar_type() == dtype, "weight: expected the accumulation dtype of the map");
}

// Raises unless t is a map of the same dtype and of this shape; its values otherwise, null for none.
inline const void* map_values(const std::optional<Tensor>& t, const MapShape& s, ScalarType dtype, const char* name) {
  if (!t.has_value()) return nullptr;
  const MapShape own = map_shape(*t, name);
  STD_TORCH_CHECK(own.samples == s.samples && own.channels == s.channels && own.height == s.height &&
                      own.width == s.width && t->scalar_type() == dtype,
                  name, ": expected a map of shape (", s.samples, ", ", s.channels, ", ", s.height, ", ", s.width,
                  ") and the dtype of x");
  return t->const_data_ptr();
}

}  // namespace biasloss
