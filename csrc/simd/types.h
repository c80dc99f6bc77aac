// 16-bit elements as plain bits: what crosses the line between torch and the SIMD kernels.
#pragma once

#include <cstdint>

namespace biasloss {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What sums over elements of type T are kept in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using AccumulatorOf = typename Accumulator<T>::type;

}  // namespace biasloss
