"""Bias-weighted cross-entropy."""
