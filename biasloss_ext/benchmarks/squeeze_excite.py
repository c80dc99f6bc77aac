"""The gate of a squeeze-and-excitation, and the two ways to write it in layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.benchmarks import composition
from biasloss_ext.benchmarks.composition import Parameters
from biasloss_ext.benchmarks.contender import Contender, Cost, Inputs, Op, Workload
from biasloss_ext.ops import maps
from biasloss_ext.ops.squeeze_excite import op


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    return composition.images_and_gradient(workload, device, (workload.batch, *workload.sample))


def cost(workload: Workload) -> Cost:
    (channels,), hidden = workload.sample, workload.option("hidden")
    weights = 2 * channels * hidden + channels + hidden
    return composition.least(workload, workload.activations, weights, flops=4 * workload.batch * channels * hidden)


def _draw(workload: Workload) -> Parameters:
    (channels,), hidden = workload.sample, workload.option("hidden")
    reduce, expand = composition.drawn_weight(hidden, channels), composition.drawn_weight(channels, hidden)
    return Parameters((reduce, 0.1 * torch.randn(hidden), expand, 0.1 * torch.randn(channels)))


def _linear(workload: Workload, x: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    reduce, reduce_bias, expand, expand_bias = parameters.weights
    return (F.hardsigmoid(F.linear(F.relu(F.linear(x, reduce, reduce_bias)), expand, expand_bias)),)


def _conv2d(workload: Workload, x: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    """On maps of one position, as torchvision and timm have it."""
    reduce, reduce_bias, expand, expand_bias = parameters.weights
    hidden = F.relu(F.conv2d(x[:, :, None, None], reduce[:, :, None, None], reduce_bias))
    return (F.hardsigmoid(F.conv2d(hidden, expand[:, :, None, None], expand_bias)).flatten(1),)


def _ours(workload: Workload, x: Tensor, gradient: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    activations: dict[str, Any] = {"activation": maps.RELU, "gate_activation": maps.HARDSIGMOID}
    gate, reduced, expanded = op.forward(x, *parameters.weights, **activations)
    if not workload.backward:
        return (gate,)
    reduce, _, expand, _ = parameters.weights
    *gradients, _ = op.backward(gradient, x, reduced, expanded, reduce, expand, **activations)
    return gate, *gradients


CONTENDERS: tuple[Contender, ...] = (
    composition.our_contender("biasloss_ext", _draw, _linear, _ours, ("squeeze_excite",)),
    composition.plain_contender("Linear", _draw, _linear),
    composition.plain_contender("Conv2d 1x1", _draw, _conv2d),
    composition.compiled_contender("torch.compile", _draw, _linear),
)

OP = Op("squeeze_excite", CONTENDERS, make_inputs, cost, composition.TOLERANCE)
