"""A small share of ``python -m tests.fuzz``."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys

import pytest
import torch

from tests.fuzz.memory import GuardedMemory
from tests.fuzz.run import fuzz

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded by mmap of Linux")


def test_no_call_ends_the_process_or_changes_its_inputs() -> None:
    findings = fuzz(seed=0, first=0, count=6000)
    assert not findings, "\n".join(map(str, findings))


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
