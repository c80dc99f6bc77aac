"""These tests need a simulated GPU; tests/cudasim/test_simulated_gpu.py runs them in a process that has one."""

from __future__ import annotations

import pytest

from biasloss_ext.ops.native import native, simulated
from tests.cudasim.simulated_gpu import Simulator

collect_ignore_glob = [] if simulated() else ["test_*.py"]


@pytest.fixture
def simulator() -> Simulator:
    """The device of this process; launches and barriers before the test are forgotten."""
    native()
    found = Simulator()
    found.take_launches()
    found.take_barriers()
    return found
