"""`accelerate` and `optimize_for_inference` on torchvision's and timm's own models; skipped where they cannot be imported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from biasloss_ext import accelerate, optimize_for_inference
from tests.nn.blocks import randomize, step
from tests.runnable import imported


def check(model: nn.Module, blocks: int) -> None:
    """Accelerated and optimized, the model computes what it computed, in float64."""
    randomize(model, torch.Generator().manual_seed(0))
    model = model.double()
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = copy.deepcopy(model)
    report = accelerate(fused)
    assert len(report.swapped) >= blocks, report
    assert list(fused.state_dict()) == list(model.state_dict())
    results = []
    for network in (model, fused):
        torch.manual_seed(2)
        network.train()
        results.append(step(network, network, images, torch.ones(2, 10, dtype=torch.float64)))
    for name, value in results[0].items():
        atol = 1e-7 * max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        expected = model.eval()(images)
        torch.testing.assert_close(optimize_for_inference(model)(images), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("mobilenet_v2", 17), ("mobilenet_v3_small", 11), ("mobilenet_v3_large", 15), ("efficientnet_b0", 16)],
)
def test_torchvision(name: str, blocks: int) -> None:
    check(getattr(imported("torchvision").models, name)(num_classes=10), blocks)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("mobilenetv2_100", 19), ("mobilenetv3_large_100", 17), ("efficientnet_b0", 18), ("efficientnet_lite0", 18)],
)
def test_timm(name: str, blocks: int) -> None:
    check(imported("timm").create_model(name, num_classes=10), blocks)
