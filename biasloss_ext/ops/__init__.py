"""The ops: declarations, reference implementations, kernels and the choice between them."""

import importlib

FAMILIES = (
    "batch_norm",
    "bias_loss",
    "depthwise",
    "expand_depthwise",
    "feature_variance",
    "pointwise",
    "pool_variance",
    "program",
    "squeeze_excite",
)
# Importing an op declares it, so that whoever asks for the ops finds all of them.
for _family in FAMILIES:
    importlib.import_module(f"biasloss_ext.ops.{_family}.op")
importlib.import_module("biasloss_ext.ops.flops").register()
