// Loads, stores and atomics of global memory. Vector accesses check their alignment, which a GPU demands and a CPU
// forgives.
#pragma once

#include <cstdint>
#include <string>

#include "scheduler.h"

namespace cudasim {

template <class T>
const T* aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    scheduler().fail("misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  return p;
}

}  // namespace cudasim

template <class T>
T __ldg(const T* p) {
  return *cudasim::aligned(p);
}

template <class T>
T __ldcg(const T* p) {
  return *cudasim::aligned(p);
}

// All fibers share one operating system thread, so that memory is ordered as written; what remains is to let others
// run.
inline void __threadfence() { cudasim::scheduler().yield(); }

inline unsigned atomicInc(unsigned* p, unsigned last) {
  cudasim::scheduler().yield();
  const unsigned old = *p;
  *p = old >= last ? 0 : old + 1;
  return old;
}
