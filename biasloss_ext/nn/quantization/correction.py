"""Corrects layers for what rounding shifts and shrinks.

A large part of an image often has one value, a background or the bound of an activation, and all of it is rounded one way. The
mean of what a layer computes shifts then, and no later layer averages that out. Values beyond the levels are cut off, which
shrinks results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biasloss_ext.nn.quantization.code import WITH_WEIGHTS, objection, quantized_layer, read_as_bytes
from biasloss_ext.nn.quantization.layers import Layer
from biasloss_ext.nn.quantization.levels import Levels
from biasloss_ext.ops import maps

SMALLEST_VARIANCE = 1e-8
FACTORS = (0.8, 1.25)  # others come from too few images


def corrections(layers: list[Layer], levels: dict[int, Levels], x: Tensor) -> dict[int, Tensor]:
    """Of each layer on bytes, by the number of its value: a factor and an addend of each output, (2, K).

    Layer by layer, on some images, they make of what the rounded layers compute before the activation the best linear prediction
    of the same in float32.

    Args:
        layers: of a program.
        levels: of its values.
        x: images (N, C, H, W), all of which are computed at once.
    """
    found: dict[int, Tensor] = {}
    as_bytes = read_as_bytes(layers)
    last_reader = {number: layer for layer in layers for number in layer.reads}

    def written(number: int, y: Tensor) -> Tensor:
        return levels[number].rounded(y) if number in as_bytes else y

    exact, ours = {0: x}, {0: written(0, x)}
    for layer in layers:
        rounded = layer
        if layer.kind in WITH_WEIGHTS and objection(layer) is None:
            rounded = _of_rounded_weight(layer, levels[layer.input])
            found[layer.output] = _prediction(
                _linear(rounded)(ours[layer.input], None), _linear(layer)(exact[layer.input], None)
            )
            rounded = with_correction(rounded, found)
        exact[layer.output] = layer(exact[layer.input], exact.get(layer.other))
        ours[layer.output] = written(layer.output, rounded(ours[layer.input], ours.get(layer.other)))
        for number in layer.reads:
            if last_reader[number] is layer:
                exact.pop(number, None)
                ours.pop(number, None)
    return found


def with_correction(layer: Layer, found: dict[int, Tensor]) -> Layer:
    if layer.output not in found:
        return layer
    (weight, bias), (factor, addend) = layer.tensors, found[layer.output]
    by_output = factor.view(-1, *(1,) * (weight.dim() - 1))
    return layer._replace(tensors=(weight * by_output, torch.addcmul(addend, bias, factor)))


def _of_rounded_weight(layer: Layer, x_levels: Levels) -> Layer:
    weight, bias = layer.tensors
    quantized, step = quantized_layer(layer, x_levels)
    real = (quantized * step[:, None, None, None]).to(weight.dtype)
    return layer._replace(tensors=(real.reshape(weight.shape).contiguous(), bias))


def _prediction(ours: Tensor, exact: Tensor) -> Tensor:
    """The factor and the addend of each channel."""
    ours, exact = (y.transpose(0, 1).flatten(1) for y in (ours, exact))
    our_mean, mean = ours.mean(1), exact.mean(1)
    from_mean = ours - our_mean[:, None]
    variance = from_mean.square().mean(1)
    factor = (from_mean * (exact - mean[:, None])).mean(1) / variance
    factor = torch.where(variance > SMALLEST_VARIANCE, factor.clamp(*FACTORS), 1.0)
    return torch.stack((factor, mean - factor * our_mean))


def _linear(layer: Layer) -> Layer:
    return layer._replace(activation=maps.IDENTITY, other=-1)
