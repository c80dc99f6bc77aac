"""Blocks with everything about them drawn, and what a training step makes of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from biasloss_ext.nn import InvertedResidual


@dataclass
class Case:
    block: InvertedResidual
    images: Tensor
    grad: Tensor
    training: bool


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Normalizations as after some training: no ones, no zeros."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -1.0, 1.0),
                (norm.running_mean, -1.0, 1.0),
                (norm.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                tensor.data = torch.rand(tensor.shape, generator=generator) * (high - low) + low


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    channels = draw(st.sampled_from((1, 3, 8, 16, 24)))
    out_channels = draw(st.sampled_from((channels, 5, 24)))
    kernel, stride = draw(st.sampled_from((3, 5, 7))), draw(st.sampled_from((1, 2)))
    activation = draw(st.sampled_from((nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = InvertedResidual(
            channels,
            draw(st.sampled_from((channels, 7, 16, 40, 72))),
            out_channels,
            kernel,
            stride,
            draw(st.booleans()),
            activation,
        )
    randomize(block, generator)
    shape = (draw(st.integers(1, 4)), channels, draw(st.integers(2, 12)), draw(st.integers(2, 12)))
    offset = draw(st.sampled_from((0.0, 3.0, 100.0)))
    images = torch.randn(shape, generator=generator) + offset * torch.randn((1, channels, 1, 1), generator=generator)
    height, width = (-(-size // stride) for size in shape[2:])
    training = draw(st.booleans())
    if shape[0] * height * width == 1:  # one value per channel has no variance
        training = False
    grad = torch.randn((shape[0], out_channels, height, width), generator=generator)
    return Case(block, images, grad, training)


def drawn_case(seed: int, offset: float) -> Case:
    """A case from a seed alone, in training; the images lie up to ``offset`` deviations or so from zero."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    channels, stride = choose.choice((3, 8, 16, 24)), choose.choice((1, 2))
    out_channels = choose.choice((channels, 5, 24))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = InvertedResidual(
            channels,
            choose.choice((16, 40, 72)),
            out_channels,
            choose.choice((3, 5, 7)),
            stride,
            choose.random() < 0.5,
            choose.choice((nn.ReLU, nn.Hardswish, nn.SiLU)),
        )
    randomize(block, generator)
    shape = (choose.randint(2, 4), channels, choose.randint(4, 12), choose.randint(4, 12))
    images = torch.randn(shape, generator=generator) + offset * torch.randn((1, channels, 1, 1), generator=generator)
    size = (shape[0], out_channels, -(-shape[2] // stride), -(-shape[3] // stride))
    return Case(block, images, torch.randn(size, generator=generator), True)


def step(forward: nn.Module, module: nn.Module, images: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Everything that a forward and a backward pass leave behind, by name."""
    images = images.detach().clone().requires_grad_()
    out = forward(images)
    out.backward(grad.to(out.dtype))
    assert images.grad is not None
    left = {"output": out.detach(), "gradient of the input": images.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        left[f"gradient of {name}"] = parameter.grad
    left |= {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return left
