"""What the ceilings of a machine are measured on."""

from __future__ import annotations

import pytest
import torch

from biasloss_ext.benchmarks.machine import equal_parts


@pytest.mark.parametrize(("count", "length", "parts"), [(8, 8, 1), (24, 8, 3), (128, 12, 10), (7, 2, 3)])
def test_parts_are_equal(count: int, length: int, parts: int) -> None:
    """A copy goes from any of them to the memory of one."""
    found = equal_parts(torch.arange(count), length)
    assert [part.numel() for part in found] == [length] * parts
    assert torch.equal(torch.cat(found), torch.arange(parts * length))
