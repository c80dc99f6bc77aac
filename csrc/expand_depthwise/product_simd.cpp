#include "product_simd.h"

#include "../simd/gemm.h"
#include "../simd/narrow.h"

namespace biasloss {
namespace BIASLOSS_ISA {
namespace {

inline void fetch(Upcoming& upcoming, int64_t count) {
  for (; count > 0 && upcoming.count > 0; --count, --upcoming.count)
    for (const char*& run : upcoming.runs) {
      if (run == nullptr) continue;
      for (int64_t i = 0; i < upcoming.bytes; i += kLineBytes) __builtin_prefetch(run + i);
      run += upcoming.stride;
    }
}

template <class Scalar>
void product(ProductSize size, Strided<Scalar> a, Rows<const Scalar> b, Rows<Scalar> c, bool accumulate,
             Upcoming& upcoming) {
  const int64_t blocks = blocks_of<Scalar>(size.rows, size.columns, size.depth);
  const int64_t at_once = blocks > 0 ? parts_of(upcoming.count, blocks) : 0;
  multiply(size, a, b, c, accumulate, [&] { fetch(upcoming, at_once); });
}

template <class Scalar>
void exact_product(ProductSize size, Rows<const Scalar> a, Rows<const Scalar> b, Rows<Scalar> c, bool accumulate) {
  multiply_exact(size, a, b, c, accumulate);
}

template <class Scalar>
void product_by_vectors(ProductSize size, Rows<const Scalar> a, Rows<const Scalar> b, Rows<Scalar> c) {
  multiply_vectors(size, a, b, c);
}

template <class T, class Scalar>
void widen(const T* x, int64_t rows, int64_t channels, const Scalar* mean, Scalar* to, int64_t to_stride) {
  using Vector = typename Compute<Scalar>::Vector;
  constexpr int lanes = Compute<Scalar>::lanes;
  for (int64_t row = 0; row < rows; ++row, x += channels, to += to_stride)
    for (int64_t c = 0; c < padded_columns<Scalar>(channels); c += lanes) {
      const int64_t left = channels - c > 0 ? channels - c : 0;
      const Vector shift = mean == nullptr ? Vector{} : load_first(mean + c, left);
      store(to + c, load_first(x + c, left) - shift);
    }
}

template <class Scalar>
void narrow(const Scalar* from, int64_t from_stride, int64_t rows, int64_t channels, Scalar* to, bool accumulate) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += channels)
    store_first(to, accumulate ? load(from) + load_first(to, channels) : load(from), channels);
}

template <class T, class Scalar = typename Compute<T>::Scalar>
constexpr ExpansionKernels<T, Scalar> kernels = {product<Scalar>, exact_product<Scalar>, product_by_vectors<Scalar>,
                                                 pack<Scalar>,    widen<T, Scalar>,      narrow<Scalar>};

}  // namespace

extern const ExpansionTables expansion_tables;
const ExpansionTables expansion_tables = {kernels<float>, kernels<double>, kernels<Float16>, kernels<BFloat16>};

}  // namespace BIASLOSS_ISA
}  // namespace biasloss
