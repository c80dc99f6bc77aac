"""Accelerated networks in a process in which no tensor's neighborhood can be read or written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc and the GNU C library"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    command = ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", HERE / "guard_pages.c", "-o", path, "-lpthread"]
    subprocess.run(command, check=True)
    return path


WRITE_A_BYTE = """
import ctypes, sys, torch
tensor = torch.empty(251)
ctypes.memset(tensor.data_ptr() + int(sys.argv[1]), 0, 1)
del tensor
print("ended")
"""


def guarded(library: Path, side: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_PRELOAD": str(library), "GUARD_PAGES": side}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("side", ["start", "end"])
def test_networks_stay_within_their_tensors(library: Path, side: str) -> None:
    result = guarded(library, side, "-m", "tests.asan.guarded_steps")
    assert result.stdout == "ended\n", (result.returncode, result.stderr[-4000:])


@pytest.mark.parametrize(("side", "offset"), [("start", -1), ("end", 1004)])
def test_faults_are_found(library: Path, side: str, offset: int) -> None:
    """Next to a tensor of 1004 bytes."""
    result = guarded(library, side, "-c", WRITE_A_BYTE, str(offset))
    assert result.returncode < 0 and result.stdout == "", (result.returncode, result.stderr[-4000:])
