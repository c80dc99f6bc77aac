"""The gate of squeeze-and-excitation from the pooled map."""
