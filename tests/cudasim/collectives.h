// Barriers, and what the lanes of a warp do together.
#pragma once

#include <cstring>

#include "scheduler.h"

namespace cudasim {

template <class T>
T slot_value(const unsigned char* slots, unsigned lane) {
  T value;
  std::memcpy(&value, slots + 16 * lane, sizeof(T));
  return value;
}

// What lane `source` of the mask holds; a lane outside the mask has nothing to give.
template <class T>
T shuffle(unsigned mask, const T& value, unsigned source, const char* what) {
  static_assert(sizeof(T) <= 16, "a slot holds 16 bytes");
  const unsigned char* slots = scheduler().exchange(mask, &value, sizeof(T), what);
  if ((mask >> source & 1) == 0)
    scheduler().fail(std::string(what) + ": lane " + std::to_string(source) + " is read, but not in the mask");
  return slot_value<T>(slots, source);
}

}  // namespace cudasim

#define __syncthreads() ::cudasim::scheduler().barrier(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cudasim::scheduler().exchange(mask, &mask, sizeof(mask), "__syncwarp");
  if (mask == 0xffffffffu) ++cudasim::scheduler().current().warp_epoch;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cudasim::shuffle(mask, value, unsigned(source) % 32, "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cudasim::shuffle(mask, value, cudasim::scheduler().current().lane() ^ unsigned(lane_mask), "__shfl_xor_sync");
}
