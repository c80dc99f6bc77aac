// All kernels of the depthwise convolution.
#pragma once

#include "backward.cuh"
#include "finish.cuh"
#include "forward.cuh"
