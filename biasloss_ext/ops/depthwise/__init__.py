"""Depthwise convolution with a batch normalisation on either side folded in."""
