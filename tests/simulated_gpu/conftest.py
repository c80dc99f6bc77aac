"""These tests need a simulated GPU; tests/cudasim/test_simulated_gpu.py runs them in a process that has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from biasloss_ext.ops.native import native, simulated
from tests.cudasim.simulated_gpu import Simulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ops"))  # its samples of every op

collect_ignore_glob = [] if simulated() else ["test_*.py"]


@pytest.fixture
def simulator() -> Simulator:
    """The device of this process; launches and barriers before the test are forgotten."""
    native()
    found = Simulator()
    found.take_launches()
    found.take_barriers()
    return found
