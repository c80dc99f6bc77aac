"""Settings of all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# CI draws the same cases every time: a failure there is the change's own. Elsewhere every run draws new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Compilers, simulators and interpreters of GPU kernels: minutes of building, for what a change of kernels alone can break.
SLOW_FOLDERS = ("asan", "cuda_resources", "cudasim", "launches", "triton_resources")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
