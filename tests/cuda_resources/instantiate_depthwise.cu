// The kernels of the depthwise convolution, as the launchers instantiate them; without float16, which compiles to what
// bfloat16 does, and float64, which is there for exactness.
#include "depthwise/kernels.cuh"

namespace biasloss {

#define INSTANTIATE(T, kernel, stride)                                          \
  template __global__ void depthwise_forward_kernel<T, float, kernel, stride>(  \
      const DepthwiseForwardParameters<T, float>);                              \
  template __global__ void depthwise_backward_kernel<T, float, kernel, stride>( \
      const DepthwiseBackwardParameters<T, float>)

#define INSTANTIATE_ALL(T) \
  INSTANTIATE(T, 3, 1);    \
  INSTANTIATE(T, 3, 2);    \
  INSTANTIATE(T, 5, 1);    \
  INSTANTIATE(T, 5, 2);    \
  INSTANTIATE(T, 7, 1);    \
  INSTANTIATE(T, 7, 2)

INSTANTIATE_ALL(float);
INSTANTIATE_ALL(__nv_bfloat16);

}  // namespace biasloss
