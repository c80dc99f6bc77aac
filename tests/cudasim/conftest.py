"""The simulator as a fixture, built once a session."""

from __future__ import annotations

import importlib.util
import os
import shutil
from types import ModuleType

import pytest

from tests.cudasim import build

SANITIZED = os.environ.get("BIASLOSS_CUDASIM_SANITIZE") == "1"


@pytest.fixture(scope="session")
def compilers() -> None:
    """Skips where nothing can be built."""
    for need in ("pybind11", "ninja"):
        if importlib.util.find_spec(need) is None and shutil.which(need) is None:
            pytest.skip(f"the CUDA simulator is built with {need}, which is not installed")
    if shutil.which("g++") is None:
        pytest.skip("the CUDA simulator is built with g++, which is not on the PATH")


@pytest.fixture(scope="session")
def simulator(compilers: None) -> ModuleType:
    return build.load(sanitize=SANITIZED)
