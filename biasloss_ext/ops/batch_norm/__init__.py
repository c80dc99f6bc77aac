"""Batch normalization in pieces: moments, application with activation and residual, sums and gradient of the backward."""
