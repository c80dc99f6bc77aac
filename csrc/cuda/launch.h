// What every launcher needs: the device made current, torch's current stream, the launch itself and its check.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "device.h"

namespace biasloss {

// The device of a tensor is current, and torch's current stream of it known, while this lives.
class LaunchContext {
 public:
  explicit LaunchContext(const torch::stable::Tensor& tensor) : device_(tensor), stream_(device_.stream()) {}

  int device() const { return device_.index(); }
  cudaStream_t stream() const { return stream_; }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, const Arguments&... arguments) const {
    launch_with_shared(0, kernel, grid, threads, arguments...);
  }

  // With so many bytes of dynamic shared memory for every block.
  template <class... Parameters, class... Arguments>
  void launch_with_shared(size_t shared_bytes, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                          const Arguments&... arguments) const {
    check_cuda(launch_kernel(kernel, grid, dim3(threads), shared_bytes, stream_, arguments...));
  }

 private:
  CurrentDevice device_;
  cudaStream_t stream_;
};

}  // namespace biasloss
