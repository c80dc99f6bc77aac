"""Global average pool of an activated map, and the per-sample variance that Bias Loss needs, in one read."""
