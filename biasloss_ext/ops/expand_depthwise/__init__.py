"""1x1 expansion and depthwise convolution in one: the expanded map is never stored."""
