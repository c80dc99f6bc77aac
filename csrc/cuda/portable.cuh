// The little that device code needs besides the language: kernels include this, and so compile with nvcc for a GPU and
// with an ordinary C++ compiler for the simulator of tests/cudasim, which brings its own header of this interface.
#pragma once

#ifdef CUDASIM

#include "cudasim.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace biasloss {

// A pointer to shared memory; a checked one in the simulator.
template <class T>
using SharedPointer = T*;

// x itself, of which the compiler does not know that it stays the same: what follows from it is computed anew in every
// turn of a loop, where registers are dearer than instructions.
__device__ __forceinline__ unsigned recomputed(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace biasloss

// `count` elements of static shared memory. Raw bytes, so that T may have any constructors.
#define BIASLOSS_SHARED(T, name, count)                                     \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(T) * (count)]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)

// As much as the launch has asked for.
#define BIASLOSS_DYNAMIC_SHARED(T, name)                        \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)

#endif

namespace biasloss {

constexpr unsigned kWarpSize = 32;

}  // namespace biasloss
