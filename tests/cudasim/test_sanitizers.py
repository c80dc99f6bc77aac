"""The kernel tests once more under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

# The tests that reach every branch of index arithmetic; the rest only vary values.
SELECTED = (
    "test_right_kernels or test_every_alignment_and_length or test_any_number or (test_every_schedule and seed0) or "
    "(test_strides_of_scores and dtype0) or test_very_many_classes or test_many_positions or test_target_out_of_range or "
    "test_classes_side_by_side or test_variance_in_place or test_deep_stack or test_mistakes_are_named or "
    "test_depthwise_edges"
)


def runtime(name: str) -> str:
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ comes without {name}")
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "BIASLOSS_CUDASIM_SANITIZE": "1",
        # libstdc++ beside it: otherwise the sanitizer looks for the function that throws before it is loaded.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python never frees some of its objects; fibers move between stacks.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Every array is an allocation of its own, with red zones around it.
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def sanitized_build(simulator: object) -> None:
    """Skips where the simulator cannot be built; builds outside the sanitized process, whose preload is not for g++."""
    import build

    runtime("libasan.so")
    build.build(sanitize=True)


def test_kernels_under_sanitizers() -> None:
    result = run(
        "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", str(HERE), "-k", SELECTED, "--ignore", __file__
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "passed" in result.stdout


def test_a_write_past_the_end_is_seen() -> None:
    """That the sanitizer sees device code at all: one element too far, in global memory."""
    script = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import build, numpy\n"
        "simulator = build.load(sanitize=True)\n"
        "simulator.global_out_of_range(numpy.zeros(64, numpy.float32), threads=64)\n"
    )
    result = run("-c", script)
    assert result.returncode != 0
    # Past the red zone there may be memory that was freed before.
    assert "AddressSanitizer: heap-" in result.stderr and "global_out_of_range_kernel" in result.stderr
