// What every launcher needs: the device made current, torch's current stream, the launch itself and its check.
#pragma once

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

inline int multiprocessors(int device) {
  constexpr int kRememberedDevices = 64;
  static std::array<std::atomic<int>, kRememberedDevices> known{};
  if (device < kRememberedDevices && known[device] != 0) return known[device];
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (device < kRememberedDevices) known[device] = count;
  return count;
}

// The device of a tensor is current, and torch's current stream of it known, while this lives.
class LaunchContext {
 public:
  explicit LaunchContext(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Arguments&... arguments) const {
    launch_with_shared(0, kernel, grid, threads, arguments...);
  }

  // With so many bytes of dynamic shared memory for every block.
  template <class... Parameters, class... Arguments>
  void launch_with_shared(size_t shared_bytes, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                          const Arguments&... arguments) const {
    kernel<<<grid, threads, shared_bytes, stream_>>>(arguments...);
    check_cuda(cudaGetLastError());
  }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace biasloss
