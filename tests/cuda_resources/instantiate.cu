// Every kernel of the loss, as the launchers instantiate them.
#include "bias_loss/kernels.cuh"
#include "feature_variance/kernels.cuh"

namespace biasloss {

#define INSTANTIATE(T, Acc)                                                                          \
  template __global__ void feature_variance_kernel<T, Acc>(const FeatureVarianceParameters<T, Acc>); \
  template __global__ void bias_loss_forward_kernel<T, Acc, true>(const ForwardParameters<T, Acc>);  \
  template __global__ void bias_loss_forward_kernel<T, Acc, false>(const ForwardParameters<T, Acc>); \
  template __global__ void bias_loss_backward_kernel<T, Acc>(const BackwardParameters<T, Acc>)

INSTANTIATE(float, float);
INSTANTIATE(__half, float);
INSTANTIATE(__nv_bfloat16, float);
INSTANTIATE(double, double);
template __global__ void weigh_positions_kernel<float>(float*, const float*, int64_t, int64_t);
template __global__ void weigh_positions_kernel<double>(double*, const double*, int64_t, int64_t);

}  // namespace biasloss
