"""A first step under capture of a CUDA graph is refused in one sentence, before it can break the context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from biasloss_ext.ops import triton_launch


class Kernel:
    """Counts its launches through Triton."""

    arg_names = ("x_ptr",)
    __name__ = "kernel"

    def __init__(self) -> None:
        self.launched = 0

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*_: Any, **__: Any) -> None:
            self.launched += 1

        return run


@pytest.fixture
def tensor() -> Any:
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 7), data_ptr=lambda: 16)


def test_a_kernel_is_not_compiled_under_capture(monkeypatch: pytest.MonkeyPatch, tensor: Any) -> None:
    kernel = Kernel()
    launch = triton_launch.Launch(kernel, 1, (), {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run one step with them eagerly, then capture"):
        launch(tensor)
    assert kernel.launched == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch(tensor)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch(tensor)
    assert kernel.launched == 2


def test_counters_are_not_allocated_under_capture(monkeypatch: pytest.MonkeyPatch, tensor: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="allocates counters, which a CUDA graph cannot capture"):
        triton_launch.tickets(tensor, 3)


def test_captured_launches_share_no_counters(monkeypatch: pytest.MonkeyPatch, tensor: Any) -> None:
    ring = torch.zeros(8, dtype=torch.int32)
    monkeypatch.setitem(triton_launch._of_graphs, tensor.device, ring)
    monkeypatch.setitem(triton_launch._taken_by_graphs, tensor.device, 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first, second, third = (triton_launch.tickets(tensor, 3) for _ in range(3))
    assert second.data_ptr() - first.data_ptr() == 16  # aligned
    assert third.data_ptr() == first.data_ptr()  # once all are taken
