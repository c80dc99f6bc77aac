"""Kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in processes of their own: small right and wrong ones; those
of the package, with their launchers, are in test_simulated_gpu.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cudasim import build, sanitizers

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module", autouse=True)
def sanitized_build(simulator: object) -> None:
    """Skips where the simulator cannot be built; builds outside the sanitized process, whose preload is not for g++."""
    sanitizers.runtime("libasan.so")
    build.build(sanitize=True)


def test_kernels_under_sanitizers() -> None:
    selected = "test_right_kernels or test_deep_stack or test_mistakes_are_named"
    options = ("-q", "-x", "-s", "-p", "no:cacheprovider", "-k", selected)
    file = str(HERE / "test_simulator.py")
    result = sanitizers.run("-m", "pytest", *options, file, folder=build.ROOT, BIASLOSS_CUDASIM_SANITIZE="1")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "passed" in result.stdout


def test_a_write_past_the_end_is_seen() -> None:
    """That the sanitizer sees device code at all: one element too far, in global memory."""
    script = (
        "import numpy\n"
        "from tests.cudasim import build\n"
        "simulator = build.load(sanitize=True)\n"
        "simulator.global_out_of_range(numpy.zeros(64, numpy.float32), threads=64)\n"
    )
    result = sanitizers.run("-c", script, folder=build.ROOT)
    assert result.returncode != 0
    # Past the red zone there may be memory that was freed before.
    assert "AddressSanitizer: heap-" in result.stderr and "global_out_of_range_kernel" in result.stderr
