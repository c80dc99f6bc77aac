"""Bias Loss, forward and backward, beside its peers: ``pytest bench --benchmark-enable``. One group a shape and layout."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from biasloss_ext.demo import TIMED_SHAPES, contenders

NAMES = (
    "FusedBiasLoss",
    "variance given",
    "published formulation",
    "cross-entropy alone",
    "one read + cross-entropy",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", TIMED_SHAPES, ids=["128x960x7x7", "128x512x4x4"])
def test_loss(
    benchmark: BenchmarkFixture, shape: tuple[int, int, int, int], layout: torch.memory_format, name: str
) -> None:
    samples, channels, size, classes = shape
    benchmark.group = f"{samples} x {channels} x {size} x {size}, {classes} classes, {layout}"
    features = torch.randn(samples, channels, size, size).contiguous(memory_format=layout)
    output = torch.randn(samples, classes, requires_grad=True)
    step = contenders(features, output, torch.randint(classes, (samples,)))[name]
    benchmark.pedantic(step, rounds=50, warmup_rounds=5)
