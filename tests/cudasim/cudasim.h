// CUDA C++ for an ordinary compiler: csrc/cuda/portable.cuh includes this in place of the CUDA headers. Kernels are
// plain functions, their threads fibers.
#pragma once

#include <cmath>

#include "collectives.h"
#include "memory.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::cudasim::scheduler().current().thread_index)
#define blockIdx (::cudasim::scheduler().current().block->block_index)
#define blockDim (::cudasim::scheduler().block())
#define gridDim (::cudasim::scheduler().grid())

namespace biasloss {

template <class T>
using SharedPointer = cudasim::SharedArray<T>;

inline unsigned recomputed(unsigned x) { return x; }

}  // namespace biasloss

#define BIASLOSS_SHARED(T, name, count) const auto name = ::cudasim::shared_array<T>(__FILE__, __LINE__, #name, count)
#define BIASLOSS_DYNAMIC_SHARED(T, name) \
  const auto name =                      \
      ::cudasim::shared_array<T>(__FILE__, __LINE__, #name, ::cudasim::scheduler().dynamic_shared_bytes() / sizeof(T))

namespace cudasim {

template <class... Parameters, class... Arguments>
void launch(const Schedule& schedule, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const Arguments&... arguments) {
  scheduler().run(grid, block, shared_bytes, schedule, [&] { kernel(arguments...); });
}

}  // namespace cudasim
