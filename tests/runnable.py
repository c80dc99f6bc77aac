"""What tests can run and import here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import biasloss_ext  # noqa: F401  (declares the ops)
from biasloss_ext.ops import backends
from biasloss_ext.ops.native import native

ROOT = Path(__file__).parents[1]


def backends_of(op: str) -> tuple[str, ...]:
    """Those of an op that run on CPU tensors in this process, the reference last: compiled kernels; on a simulated GPU
    those for CUDA, and Triton's under its interpreter."""
    cpu = torch.device("cpu")
    kernels = (name for name in backends.BACKENDS_OF[op] if name != "reference")
    return (*(name for name in kernels if backends.why_not(name, cpu, op) is None), "reference")


def variant_in_use() -> str:
    """The instruction set of the CPU kernels that run here."""
    return native().build.get("cpu_variant_in_use", "baseline")


def other_variants() -> list[str]:
    """The other ones of this build that run here: older ones, since the best is in use."""
    built = native().build.get("cpu_variants", "baseline").split(";")
    return built[: built.index(variant_in_use())]


def assert_tests_pass_on(instruction_set: str, selected: str, *files: str | Path) -> None:
    """Run the tests of these files that ``selected`` chooses, as after ``-k``, in a process limited to an instruction set."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *map(str, files)],
        env={**os.environ, "BIASLOSS_CPU_ISA": instruction_set},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def imported(package: str) -> Any:
    """The package; where it cannot be imported, the test is skipped."""
    try:
        return __import__(package)
    except (ImportError, RuntimeError) as error:  # torchvision beside a CPU-only torch fails while it registers its ops
        pytest.skip(f"{package} cannot be imported: {str(error).splitlines()[0]}")
