"""1x1 convolution with the normalisation, activation and gate before it, and the next one's moments, folded in."""
