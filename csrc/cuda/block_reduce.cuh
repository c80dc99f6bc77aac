// Reductions over a warp and over a block, always in the same order, so that a result does not change from run to run.
#pragma once

#include <cstring>
#include <type_traits>

#include "../math/moments.h"
#include "portable.cuh"

namespace biasloss {

constexpr unsigned kFullWarp = 0xffffffffu;

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Merge {
  template <class T>
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    return merge(a, b);
  }
};

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ unsigned warp_index() { return threadIdx.x / kWarpSize; }

// Any plain struct, word by word.
template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, unsigned lane_mask) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % sizeof(unsigned) == 0, "made of 4-byte words");
  unsigned word[sizeof(T) / sizeof(unsigned)];
  std::memcpy(word, &value, sizeof(T));
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / sizeof(unsigned); ++i) word[i] = __shfl_xor_sync(kFullWarp, word[i], lane_mask);
  T result;
  std::memcpy(&result, word, sizeof(T));
  return result;
}

// Over groups of `lanes` neighbors, a power of two. The first lane of each group holds the result: in the others
// operands come in another order, which rounds differently.
template <class T, class Operation>
__device__ __forceinline__ T warp_reduce(T value, Operation operation, unsigned lanes = kWarpSize) {
  for (unsigned mask = lanes / 2; mask != 0; mask /= 2) value = operation(value, shuffle_xor(value, mask));
  return value;
}

// Every thread gets the result. `buffer` holds one value a warp and may be used again at once.
template <class T, class Operation>
__device__ __forceinline__ T block_reduce(T value, SharedPointer<T> buffer, Operation operation) {
  value = warp_reduce(value, operation);
  __syncthreads();  // until everyone has read what an earlier reduction left in the buffer
  if (lane_index() == 0) buffer[warp_index()] = value;
  __syncthreads();
  T total = buffer[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarpSize; ++warp) total = operation(total, T(buffer[warp]));
  return total;
}

}  // namespace biasloss
