"""These tests run on a GPU, or on the simulated one of tests/cudasim, where CPU tensors stand in for a GPU's; without either they
are skipped. Streams, graphs and sizes need a GPU."""

from __future__ import annotations

import pytest
import torch

from biasloss_ext.ops import backends
from biasloss_ext.ops.native import simulated


@pytest.fixture
def device() -> torch.device:
    if simulated():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch finds none here")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """A device with streams, graphs and gigabytes."""
    if device.type != "cuda":
        pytest.skip("needs a real GPU")
    return device


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    reason = backends.why_not(request.param, device)
    if reason is not None:
        pytest.skip(f"backend {request.param} cannot run here: {reason}")
    return str(request.param)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes TF32 unless told otherwise; the reference's convolution must not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
