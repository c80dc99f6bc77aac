"""SkipblockNet-M against an independent float64 computation, with weights under the authors' key names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from biasloss_ext import models
from tests.models.random_weights import random_state
from tests.models.skipblocknet_oracle import State, skipblocknet_m

# Every key and shape of the published checkpoint of SkipblockNet-M.
SHAPES: dict[str, list[int]] = json.loads(
    (Path(__file__).parent / "data" / "skipblocknet_m_state_dict.json").read_text()
)


def random_checkpoint() -> State:
    return random_state(SHAPES, torch.float64)


def model_with(checkpoint: State) -> models.SkipblockNet:
    model = models.skipblocknet_m(drop_rate=0, return_features="features").double()
    model.load_state_dict(checkpoint, strict=True)
    return model


def test_the_published_checkpoint_fits_without_change() -> None:
    state = models.skipblocknet_m().state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == SHAPES
    assert list(state) == list(SHAPES)


@pytest.mark.parametrize("size", [(224, 224), (75, 50), (32, 33)])
def test_evaluation_agrees_with_the_oracle(size: tuple[int, int]) -> None:
    checkpoint = random_checkpoint()
    model = model_with(checkpoint).eval()
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        actual = model(images)
        expected = skipblocknet_m(checkpoint, images, training=False)
    assert expected[1].std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(64, 64), (75, 50)])
def test_training_agrees_with_the_oracle(size: tuple[int, int]) -> None:
    checkpoint = random_checkpoint()
    model = model_with(checkpoint).train()
    images = torch.randn(4, 3, *size, dtype=torch.float64)
    target = torch.tensor([3, 999, 0, 500])

    actual = model(images)
    F.cross_entropy(actual[1], target).backward()

    parameters = {name: checkpoint[name].clone().requires_grad_() for name, _ in model.named_parameters()}
    state = {**checkpoint, **parameters}
    expected = skipblocknet_m(state, images, training=True)
    F.cross_entropy(expected[1], target).backward()

    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, parameters[name].grad, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, buffer in model.named_buffers():
        assert not torch.equal(buffer, checkpoint[name])
        torch.testing.assert_close(buffer, state[name], rtol=1e-8, atol=1e-8)
