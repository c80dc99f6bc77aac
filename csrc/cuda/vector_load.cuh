// 16-byte loads and stores, and where in a run of elements they are possible.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.cuh"

namespace biasloss {

constexpr unsigned kVectorBytes = 16;

template <class T>
struct Vector {
  static constexpr unsigned kSize = kVectorBytes / sizeof(T);
  uint4 bits;

  template <class Acc>
  __device__ __forceinline__ Acc get(unsigned i) const {
    T element[kSize];
    std::memcpy(element, &bits, kVectorBytes);
    return static_cast<Acc>(element[i]);
  }
};

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  return {__ldg(reinterpret_cast<const uint4*>(p))};
}

template <class T, class Acc>
__device__ __forceinline__ void store_vector(T* p, const Acc (&value)[Vector<T>::kSize]) {
  T element[Vector<T>::kSize];
#pragma unroll
  for (unsigned i = 0; i < Vector<T>::kSize; ++i) element[i] = static_cast<T>(value[i]);
  uint4 bits;
  std::memcpy(&bits, element, kVectorBytes);
  *reinterpret_cast<uint4*>(p) = bits;
}

// A run of `count` elements: a head up to the first 16-byte boundary, whole vectors, a tail.
struct AlignedRun {
  unsigned head;
  unsigned vectors;
  unsigned tail_begin;
  unsigned count;

  // The elements of head and tail, numbered through: always fewer than a warp has threads.
  __device__ __forceinline__ unsigned edges() const { return head + (count - tail_begin); }
  __device__ __forceinline__ unsigned edge(unsigned i) const { return i < head ? i : tail_begin + (i - head); }
};

template <class T>
__device__ __forceinline__ unsigned elements_to_alignment(const T* p) {
  const unsigned misalignment = static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) % kVectorBytes);
  return (kVectorBytes - misalignment) % kVectorBytes / static_cast<unsigned>(sizeof(T));
}

template <class T>
__device__ __forceinline__ AlignedRun aligned_run(const T* p, unsigned count) {
  const unsigned to_alignment = elements_to_alignment(p);
  const unsigned head = to_alignment < count ? to_alignment : count;
  const unsigned vectors = (count - head) / Vector<T>::kSize;
  return {head, vectors, head + vectors * Vector<T>::kSize, count};
}

}  // namespace biasloss
