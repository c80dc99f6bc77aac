// What a launcher asks of the CUDA runtime and of torch's CUDA device: that of a GPU, or, for the simulator of
// tests/cudasim, which brings its own header of this interface, that of a device on the CPU.
#pragma once

#ifdef CUDASIM

#include "simulated_device.h"

#else

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace biasloss {

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

inline int multiprocessors(int device) {
  constexpr int kRememberedDevices = 64;
  static std::array<std::atomic<int>, kRememberedDevices> known{};
  if (device < kRememberedDevices && known[device] != 0) return known[device];
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (device < kRememberedDevices) known[device] = count;
  return count;
}

// The stable ABI of the oldest torch served has no way to the native stream; libtorch_cuda has a C function for it,
// which a library built against a CPU-only torch finds at run time in the torch that loaded it.
inline cudaStream_t current_stream(int device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA support: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "torch could not tell the current CUDA stream of device ", device);
  return static_cast<cudaStream_t>(stream);
}

// The device of a tensor is current while this lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(const torch::stable::Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}
  int index() const { return index_; }
  cudaStream_t stream() const { return current_stream(index_); }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, shared_bytes, stream> > >(arguments...);
  return cudaGetLastError();
}

}  // namespace biasloss

#endif
