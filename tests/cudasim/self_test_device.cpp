// What the simulated device refuses, tried out by tests through ctypes.
#include "cuda/launch.h"

#define EXPORTED __attribute__((visibility("default")))

namespace {

void empty_kernel() {}

// 32 KiB of static shared memory, and whatever the launch asks for.
void shared_kernel() {
  BIASLOSS_SHARED(float, fixed, 8192);
  BIASLOSS_DYNAMIC_SHARED(float, dynamic);
  if (threadIdx.x == 0) fixed[0] = 1;
  if (threadIdx.x == 1) dynamic[0] = 1;
}

cudaError_t launch(void (*kernel)(), dim3 grid, unsigned threads, size_t shared_bytes) {
  return biasloss::launch_kernel(kernel, grid, dim3(threads), shared_bytes, nullptr);
}

}  // namespace

extern "C" {

// The error of a launch.
EXPORTED long biasloss_simulator_try_launch(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared) {
  return launch(empty_kernel, dim3(x, y, z), threads, shared);
}

// The same beside 32 KiB of static shared memory, after asking for `most` bytes; -1 where the kernel finds too little.
EXPORTED long biasloss_simulator_try_shared(unsigned shared, unsigned most) {
  if (most != 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most));
    if (error != cudaSuccess) return error;
  }
  try {
    return launch(shared_kernel, dim3(1), 32, shared);
  } catch (const cudasim::Violation&) {
    return -1;
  }
}

// How many of five calls a capture refuses.
EXPORTED long biasloss_simulator_try_capture() {
  void* memory = nullptr;
  const cudaError_t errors[] = {cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1024),
                                cudaDeviceSynchronize(), cudaStreamSynchronize(nullptr), cudaMalloc(&memory, 16),
                                cudaFree(memory)};
  long refused = 0;
  for (const cudaError_t error : errors) refused += error == cudaErrorStreamCaptureUnsupported;
  return refused;
}
}
