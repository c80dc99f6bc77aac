"""Everything that can be measured, by name. A family of ops has its benchmark in the module of its name here, and its shapes
in `shapes`."""

from __future__ import annotations

import importlib

from biasloss_ext.benchmarks import skipblocknet, small_images
from biasloss_ext.benchmarks.contender import Op
from biasloss_ext.ops import FAMILIES

OF_NETWORKS = ("program",)  # families that the benchmarks of whole networks measure
OPS: dict[str, Op] = {
    family: importlib.import_module(f"biasloss_ext.benchmarks.{family}").OP
    for family in FAMILIES
    if family not in OF_NETWORKS
}
NETWORKS = {op.name: op for op in (skipblocknet.OP, *small_images.OPS)}
OPS.update(NETWORKS)
