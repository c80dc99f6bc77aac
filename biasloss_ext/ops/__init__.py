"""The ops: declarations, reference implementations, kernels and the choice between them."""

import importlib
from pathlib import Path

FAMILIES = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/op.py")))
# Importing an op declares it, so that all of them are known.
for _family in FAMILIES:
    importlib.import_module(f"biasloss_ext.ops.{_family}.op")
importlib.import_module("biasloss_ext.ops.flops").register()
