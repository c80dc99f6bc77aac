"""1x1 convolution with the normalization, activation and gate before it, and the next one's moments, folded in."""
