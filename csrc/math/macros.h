// Headers in this folder compile as plain C++, as CUDA C++ and inside the CUDA simulator. No torch, no CUDA runtime.
#pragma once

#if defined(__CUDACC__)
#define BIASLOSS_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: these are also used by files compiled for newer CPUs, whose copy must not serve the others.
#define BIASLOSS_HOST_DEVICE inline __attribute__((always_inline))
#endif
