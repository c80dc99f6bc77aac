"""FeatureTap: Bias Loss on a model that was written without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from biasloss_ext import FeatureTap, FusedBiasLoss


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


def test_gives_features_and_output() -> None:
    net, images = network(), torch.randn(4, 3, 8, 8)
    tap = FeatureTap(net, "0")
    features, output = tap(images)
    assert features.shape == (4, 8, 6, 6)
    assert not features.requires_grad
    assert torch.equal(net[1:](features), output)
    FusedBiasLoss()(features, output, torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_state_dict_is_the_model_s_own() -> None:
    net = network()
    tap = FeatureTap(net, "0.2")
    assert list(tap.state_dict()) == list(net.state_dict())
    other = FeatureTap(network(), "0")
    other.load_state_dict(tap.state_dict(), strict=True)
    wrapped = nn.ModuleDict({"tapped": tap})
    again = nn.ModuleDict({"tapped": FeatureTap(network(), "0")})
    again.load_state_dict(wrapped.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({}, strict=True)


def test_copies_do_not_share_features() -> None:
    tap = FeatureTap(network(), "0")
    twin = copy.deepcopy(tap)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(tap(images)[0], twin(images)[0])
    assert tap._features is None
    assert twin._features is None


def test_bad_names_and_outputs() -> None:
    with pytest.raises(ValueError, match=r"no module 'flat'; similar ones: 0, 1, 2"):
        FeatureTap(network(), "flat")
    with pytest.raises(ValueError, match=r"no module '0\.3'; similar ones: 0\."):
        FeatureTap(network(), "0.3")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.LSTM(3, 4)
            self.unused = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pair(x)[0]

    with pytest.raises(TypeError, match="output of 'pair' must be a tensor, got tuple"):
        FeatureTap(Two(), "pair")(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="'unused' did not run in this call"):
        FeatureTap(Two(), "unused")(torch.randn(2, 3))
