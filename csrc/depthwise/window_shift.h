// Where the windows of a depthwise convolution begin.
#pragma once

#include <cstdint>

namespace biasloss {

// The window of output i begins at stride * i - kernel / 2 + shift, in either direction. TensorFlow's "same" padding,
// at stride 2 and of an even size, has one zero fewer before the map than behind it: a shift of 1. Elsewhere it is 0.
inline int64_t window_shift(int64_t size, int64_t stride, bool same_padding) {
  return same_padding && stride == 2 && size > 0 && size % 2 == 0 ? 1 : 0;
}

}  // namespace biasloss
