"""Per-sample variance of feature maps."""
