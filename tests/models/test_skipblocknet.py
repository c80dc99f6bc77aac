"""The four sizes: what they take, what they return, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biasloss_ext import models

NAMES = ["skipblocknet_xs", "skipblocknet_s", "skipblocknet_m", "skipblocknet_l"]


def small_model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return models.skipblocknet_xs(num_classes=10, **options)


@pytest.mark.parametrize(
    ("name", "million"), [("skipblocknet_xs", 2.3), ("skipblocknet_s", 3.6), ("skipblocknet_l", 7.1)]
)
def test_parameters_are_those_of_the_paper(name: str, million: float) -> None:
    model = models.create_model(name)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == million


def test_parameters_of_the_published_checkpoint() -> None:
    assert sum(parameter.numel() for parameter in models.skipblocknet_m().parameters()) == 5_532_352


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (160, 224), (224, 224), (256, 256)])
def test_forward_and_backward_at_every_size(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = models.create_model(name, num_classes=10, return_features="features").to(memory_format=torch.channels_last)
    features, scores = model(torch.randn(2, 3, *size).to(memory_format=torch.channels_last))
    assert features.shape == (2, model.num_features, *(math.ceil(length / 32) for length in size))
    assert scores.shape == (2, 10)
    F.cross_entropy(scores, torch.tensor([1, 9])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert model.first_layer[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(2, 3, 31, 32), (2, 3, 32, 31), (2, 1, 32, 32), (3, 32, 32), (2, 3, 1, 32, 32)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"images must be of shape \(N, 3, H, W\) with H and W at least 32, got "
    ) as caught:
        small_model()(torch.zeros(shape))
    assert str(caught.value).endswith(str(shape))


def test_the_least_size_and_other_channels() -> None:
    model = small_model(in_chans=1).eval()
    assert model(torch.zeros(1, 1, 32, 33)).shape == (1, 10)


@pytest.mark.parametrize("fused", [False, "auto"])
def test_features_and_variance_come_with_the_scores(fused: bool | str) -> None:
    model = small_model(fused=fused).eval()
    images = torch.randn(2, 3, 64, 64)
    scores = model(images)
    model.return_features = "features"
    features, scores_beside_features = model(images)
    model.return_features = "variance"
    variance, scores_beside_variance = model(images)

    # Fused, the pool adds the map up in another order than when the map is handed out.
    tolerance = 1e-5 * scores.abs().max().item() if fused else 0.0
    torch.testing.assert_close(scores_beside_features, scores, rtol=0, atol=tolerance)
    assert torch.equal(scores, scores_beside_variance)
    assert torch.equal(features, model.forward_features(images))
    assert scores.requires_grad
    assert features.requires_grad
    assert not variance.requires_grad
    expected = torch.stack([sample.double().var() for sample in features])
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=0)


def test_variance_of_16_bit_features_is_float32() -> None:
    model = small_model(return_features="variance")
    with torch.autocast("cpu", torch.bfloat16):
        variance, scores = model(torch.randn(2, 3, 32, 32))
    assert variance.dtype == torch.float32
    assert scores.dtype == torch.bfloat16


def test_unknown_return_features_is_refused() -> None:
    expected = "return_features must be one of none, features, variance, got 'all'"
    with pytest.raises(ValueError, match=expected):
        small_model(return_features="all")
    with pytest.raises(ValueError, match=expected):
        small_model().return_features = "all"


def test_small_input_doubles_every_map_and_changes_no_parameter() -> None:
    plain, small = small_model().eval(), small_model(small_input=True).eval()
    small.load_state_dict(plain.state_dict(), strict=True)
    images = torch.randn(1, 3, 32, 32)
    assert plain.forward_features(images).shape[2:] == (1, 1)
    assert small.forward_features(images).shape[2:] == (2, 2)
    assert [info["reduction"] for info in small.feature_info] == [1, 2, 4, 8, 16]


def test_channels_last_is_kept() -> None:
    model = small_model().to(memory_format=torch.channels_last)
    features = model.forward_features(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_dropout_is_before_the_last_layer() -> None:
    assert [module.p for module in small_model(drop_rate=0.7).modules() if isinstance(module, nn.Dropout)] == [0.7]
    model = small_model(drop_rate=1.0).train()
    nn.init.constant_(model.get_classifier().bias, 3.0)
    assert (model(torch.randn(2, 3, 32, 32)) == 3).all()


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = models.skipblocknet_m()
    depthwise = model.blocks[3][1].conv[3].weight
    assert depthwise.std().item() == pytest.approx(math.sqrt(2 / (25 * 960)), rel=0.02)
    assert model.conv[0].weight.std().item() == pytest.approx(math.sqrt(2 / 960), rel=0.02)
    for linear in (model.classifier[0], model.blocks[3][1].conv[6].fc[0], model.get_classifier()):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert not linear.bias.any()
    assert (model.conv[1].weight == 1).all()
    assert not model.conv[1].bias.any()


def test_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert models.skipblocknet_xs(num_classes=7)(torch.empty(2, 3, 64, 64)).shape == (2, 7)
