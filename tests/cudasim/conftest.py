"""The simulator as a fixture, built once a session; and the schedules that every kernel test runs under."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build

SANITIZED = os.environ.get("BIASLOSS_CUDASIM_SANITIZE") == "1"


@pytest.fixture(scope="session")
def simulator() -> ModuleType:
    for need in ("pybind11", "ninja"):
        if importlib.util.find_spec(need) is None and shutil.which(need) is None:
            pytest.skip(f"the CUDA simulator is built with {need}, which is not installed")
    if shutil.which("g++") is None:
        pytest.skip("the CUDA simulator is built with g++, which is not on the PATH")
    return build.load(sanitize=SANITIZED)
