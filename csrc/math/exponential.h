// Exponentials and logarithms of one number, by type.
#pragma once

#include <cmath>

#include "macros.h"

namespace biasloss {

BIASLOSS_HOST_DEVICE float exponential(float x) { return ::expf(x); }
BIASLOSS_HOST_DEVICE double exponential(double x) { return ::exp(x); }
BIASLOSS_HOST_DEVICE float exponential_minus_one(float x) { return ::expm1f(x); }
BIASLOSS_HOST_DEVICE double exponential_minus_one(double x) { return ::expm1(x); }
BIASLOSS_HOST_DEVICE float logarithm_of_one_plus(float x) { return ::log1pf(x); }
BIASLOSS_HOST_DEVICE double logarithm_of_one_plus(double x) { return ::log1p(x); }

}  // namespace biasloss
