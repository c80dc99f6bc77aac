// The kernels of the loss: device code alone.
#pragma once

#include "backward.cuh"
#include "forward.cuh"
