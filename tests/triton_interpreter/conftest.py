"""These tests need Triton's interpreter; tests/ops/test_triton_interpreter.py runs them in a process that has it."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    """Plans of earlier tests know nothing of the constants that a test changes."""
    import biasloss_ext.ops

    for module in pkgutil.walk_packages(biasloss_ext.ops.__path__, "biasloss_ext.ops."):
        if ".triton" in module.name:
            for name, plans in vars(importlib.import_module(module.name)).items():
                if name.endswith("_plans") and isinstance(plans, dict):
                    plans.clear()
