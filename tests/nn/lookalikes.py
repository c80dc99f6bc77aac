"""Blocks written as torchvision and timm write theirs, for machines where those cannot be imported.

Only what `recognize` looks at is here: names of classes and modules, attributes, forward passes. `test_integrations` runs the
same checks on the real ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _of(module: str, name: str | None = None) -> Any:
    def place(kind: type) -> type:
        kind.__module__ = module
        kind.__name__ = name or kind.__name__
        return kind

    return place


@_of("torchvision.ops.misc")
class Conv2dNormActivation(nn.Sequential):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.Hardswish,
    ) -> None:
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01),
        ]
        super().__init__(*layers, *([] if activation is None else [activation()]))


@_of("torchvision.ops.misc")
class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


@_of("torchvision.models.mobilenetv3", "InvertedResidual")
class TorchvisionV3(nn.Module):
    def __init__(
        self, inputs: int, hidden: int, outputs: int, kernel: int = 3, stride: int = 1, gate: bool = True
    ) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [] if hidden == inputs else [Conv2dNormActivation(inputs, hidden, 1)]
        layers.append(Conv2dNormActivation(hidden, hidden, kernel, stride, hidden))
        if gate:
            layers.append(SqueezeExcitation(hidden, 8))
        layers.append(Conv2dNormActivation(hidden, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return x + out if self.use_res_connect else out


@_of("torchvision.models.mobilenetv2", "InvertedResidual")
class TorchvisionV2(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if hidden != inputs:
            layers.append(Conv2dNormActivation(inputs, hidden, 1, activation=nn.ReLU6))
        layers += [
            Conv2dNormActivation(hidden, hidden, 3, stride, hidden, nn.ReLU6),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.use_res_connect else out


class StochasticDepth(nn.Module):
    """Drops whole samples of a batch in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1, dtype=x.dtype) < 0.5) if self.training else x


@_of("torchvision.models.efficientnet")
class MBConv(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.use_res_connect = True
        gate = SqueezeExcitation(hidden, 4)
        gate.activation, gate.scale_activation = nn.SiLU(), nn.Sigmoid()
        self.block = nn.Sequential(
            Conv2dNormActivation(channels, hidden, 1, activation=nn.SiLU),
            Conv2dNormActivation(hidden, hidden, 5, 1, hidden, nn.SiLU),
            gate,
            Conv2dNormActivation(hidden, channels, 1, activation=None),
        )
        self.stochastic_depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stochastic_depth(self.block(x))
        return out + x


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce, self.conv_expand = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.act1, self.gate = nn.SiLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))
        return x * gate


@_of("timm.models._efficientnet_blocks", "InvertedResidual")
class TimmInvertedResidual(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.has_skip = stride == 1 and inputs == outputs
        self.conv_s2d = self.bn_s2d = None
        self.conv_pw, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), BatchNormAct2d(hidden, nn.SiLU())
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = BatchNormAct2d(hidden, nn.SiLU())
        self.aa, self.se = nn.Identity(), SqueezeExcite(hidden)
        self.conv_pwl, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), BatchNormAct2d(outputs, nn.Identity())
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv_pw(x))
        h = self.se(self.aa(self.bn2(self.conv_dw(h))))
        h = self.drop_path(self.bn3(self.conv_pwl(h)))
        out: Tensor = h + x if self.has_skip else h
        return out


@_of("timm.models._efficientnet_blocks", "DepthwiseSeparableConv")
class TimmDepthwiseSeparable(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.has_skip = channels == outputs
        self.conv_s2d = self.bn_s2d = None
        self.conv_dw = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.bn1 = BatchNormAct2d(channels, nn.ReLU())
        self.aa, self.se = nn.Identity(), nn.Identity()
        self.conv_pw, self.bn2 = nn.Conv2d(channels, outputs, 1, bias=False), BatchNormAct2d(outputs, nn.Identity())
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop_path(self.bn2(self.conv_pw(self.se(self.aa(self.bn1(self.conv_dw(x)))))))
        out: Tensor = h + x if self.has_skip else h
        return out


def network() -> nn.Sequential:
    """One of each, on images (N, 3, H, W)."""
    return nn.Sequential(
        Conv2dNormActivation(3, 16, 3, 2),
        TorchvisionV3(16, 16, 16),
        TorchvisionV3(16, 40, 24, 5, 2),
        TorchvisionV2(24, 72, 24),
        TorchvisionV2(24, 24, 16),
        MBConv(16, 48),
        TimmInvertedResidual(16, 48, 24, 2),
        TimmDepthwiseSeparable(24, 24),
        Conv2dNormActivation(24, 32, 1),
        BatchNormAct2d(32, nn.SiLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
