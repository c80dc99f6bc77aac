"""Whether Bias Loss and SkipblockNet help: runs, their results as committed data, and the report made from them."""
