"""A small share of ``python -m tests.fuzz``, run from the root of the checkout."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fuzz.memory import GuardedMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded by mmap of Linux")


def test_no_call_ends_the_process_or_changes_its_inputs() -> None:
    # In a process of its own: threads of the tests before this one would not live on in forked children.
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--calls", "6000"], cwd=root, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("offset", [-1, 64])
def test_access_out_of_bounds_is_noticed(offset: int) -> None:
    """Of a float32 tensor of the whole memory: what the search relies on."""
    tensor = GuardedMemory(1).tensor((16 * 1024,), (1,), torch.float32, random.Random(0))
    address = tensor.data_ptr() + (offset * 4 if offset < 0 else tensor.numel() * 4)
    child = os.fork()
    if child == 0:
        os._exit(len(ctypes.string_at(address, 1)))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV
