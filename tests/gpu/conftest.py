"""These tests need a GPU; without one they are skipped."""

from __future__ import annotations

import pytest
import torch

from biasloss_ext.ops import backends


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch finds none here")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    reason = backends.why_not(request.param, device)
    if reason is not None:
        pytest.skip(f"backend {request.param} cannot run here: {reason}")
    return str(request.param)
