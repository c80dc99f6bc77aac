"""Chains with everything about them drawn, as plain modules."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nn.blocks import randomize

ACTIVATIONS = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU)


class FrozenNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d, by somebody else."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -1, 1),
            ("running_mean", -1, 1),
            ("running_var", 0.5, 2),
        ):
            self.register_buffer(name, torch.rand(channels) * (high - low) + low)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Conv2dSame(nn.Conv2d):
    """Pads as TensorFlow does, written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        around = []
        for size in reversed(x.shape[2:]):
            total = max((math.ceil(size / self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
            around += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, around), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Scale(nn.Module):
    """A layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


class Attention(nn.Module):
    """A squeeze-and-excitation as it is often written by hand: linear layers, and the sizes of its input."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, 4, bias=bias), nn.ReLU(), nn.Linear(4, channels, bias=bias), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.size()
        gate = self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1)
        return x * gate


class Chained(nn.Module):
    """Layers one after the other, and perhaps the input or another map added."""

    def __init__(self, layers: list[nn.Module], adds: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.adds else y


@dataclass
class Case:
    module: Chained
    images: Tensor
    training: bool


def drawn(seed: int) -> Case:
    """A chain of one to four convolutions from a seed."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = channels = choose.choice((3, 8, 16))
        layers: list[nn.Module] = []
        if choose.random() < 0.2:
            layers += [nn.BatchNorm2d(channels), choose.choice(ACTIVATIONS)()]
        stride = 1
        for step in range(choose.randint(1, 4)):
            made, channels, own_stride = _step(choose, channels, stride)
            stride *= own_stride
            layers += made
            if choose.random() < 0.25 and step > 0 and not isinstance(layers[-1], Scale):
                layers += [Attention(channels, choose.random() < 0.7), nn.Conv2d(channels, 12, 1), nn.BatchNorm2d(12)]
                channels = 12
        module = Chained(layers, channels == first and stride == 1 and choose.random() < 0.7)
    randomize(module, generator)
    shape = (choose.randint(1, 3), first, choose.randint(5, 11), choose.randint(5, 11))
    return Case(module, torch.randn(shape, generator=generator), choose.random() < 0.7)


def _step(choose: random.Random, channels: int, stride: int) -> tuple[list[nn.Module], int, int]:
    bias, own_stride, outputs = choose.random() < 0.3, 1, channels
    convolution: nn.Module
    if choose.random() < 0.5:
        kernel = choose.choice((1, 3, 5, 7))
        own_stride = 2 if stride == 1 and choose.random() < 0.3 else 1
        dilation = choose.choice((1, 1, 2)) if kernel > 1 and own_stride == 1 else 1
        kind = choose.choice((nn.Conv2d, Conv2dSame)) if dilation == 1 else nn.Conv2d
        options: dict[str, Any] = {"padding": kernel // 2 * dilation, "groups": channels, "bias": bias}
        convolution = kind(channels, channels, kernel, own_stride, dilation=dilation, **options)
    else:
        outputs = choose.choice((channels, 5, 16))
        own_stride = 2 if stride == 1 and choose.random() < 0.2 else 1
        convolution = nn.Conv2d(channels, outputs, 1, own_stride, bias=bias)
    norm = choose.choice((nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d, FrozenNorm, nn.Identity))(outputs)
    layers = [convolution, norm]
    if choose.random() < 0.2:
        layers.append(Scale(outputs))
    return [*layers, choose.choice(ACTIVATIONS)()], outputs, own_stride
