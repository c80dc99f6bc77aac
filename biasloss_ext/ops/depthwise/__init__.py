"""Depthwise convolution with a batch normalization on either side folded in."""
