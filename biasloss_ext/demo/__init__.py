"""``make demo``: Bias Loss against cross-entropy on handwritten digits, what it does to the features, what it costs."""
