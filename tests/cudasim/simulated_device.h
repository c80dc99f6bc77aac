// csrc/cuda/device.h for the simulator: the part of the CUDA runtime that launchers use, on a device whose memory is
// the CPU's. It refuses what a GPU refuses.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cudasim.h"

using cudaStream_t = void*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

namespace cudasim {

// Of compute capability 9.0.
constexpr size_t kSharedBytes = size_t(48) << 10, kSharedBytesOptIn = size_t(227) << 10;
constexpr unsigned kMostThreads = 1024, kMostBlocksX = 2147483647u, kMostBlocksYZ = 65535;

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  bool captured;
};

// The device, and how it runs what is launched on it.
struct Device {
  Device();
  int multiprocessors;
  bool capturing = false;
  Schedule schedule;
  std::vector<Launch> launches;
  std::unordered_map<const void*, size_t> dynamic_shared_bytes;  // of the kernels that have asked for more
  std::mutex mutex;                                              // one launch at a time

  // What a launch is refused for, if anything.
  cudaError_t refusal(const void* kernel, const Launch& launch) const;
  // The schedule of the next launch: a seed that is not 0 grows from one to the next.
  Schedule next_schedule(const void* kernel);
};

Device& device();

}  // namespace cudasim

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
// What a capture refuses.
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaMalloc(void** pointer, size_t bytes);
cudaError_t cudaFree(void* pointer);
// What becomes a part of the graph.
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream);

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace biasloss {

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// Asked anew each time: tests change it.
inline int multiprocessors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

class CurrentDevice {
 public:
  explicit CurrentDevice(const torch::stable::Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cpu(), "the simulated GPU: CPU tensors stand for a GPU's, got one of another device");
  }
  int index() const { return 0; }
  cudaStream_t stream() const { return nullptr; }
};

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                          const Arguments&... arguments) {
  cudasim::Device& device = cudasim::device();
  const std::lock_guard<std::mutex> lock(device.mutex);
  const void* const identity = reinterpret_cast<const void*>(kernel);
  const cudasim::Launch launch = {grid, block.x * block.y * block.z, shared_bytes, device.capturing};
  const cudaError_t error = device.refusal(identity, launch);
  if (error != cudaSuccess) return error;
  device.launches.push_back(launch);
  // As a launch does it: arguments are converted to what the kernel takes, and copied.
  cudasim::launch(device.next_schedule(identity), kernel, grid, block, shared_bytes,
                  static_cast<Parameters>(arguments)...);
  return cudaSuccess;
}

}  // namespace biasloss
