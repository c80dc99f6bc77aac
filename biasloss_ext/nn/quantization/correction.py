"""Corrects biases for what rounding shifts.

A large part of an image often has one value, a background or the bound of an activation, and all of it is rounded one way. The
mean of what a layer computes shifts then, and no later layer averages that out.
"""

from __future__ import annotations

from torch import Tensor

from biasloss_ext.nn.quantization.code import WITH_WEIGHTS, objection, quantized_layer, read_as_bytes
from biasloss_ext.nn.quantization.layers import Layer
from biasloss_ext.nn.quantization.levels import Levels
from biasloss_ext.ops import maps


def corrections(layers: list[Layer], levels: dict[int, Levels], x: Tensor) -> dict[int, Tensor]:
    """What to add to the bias of each layer on bytes, by the number of its value.

    Layer by layer, what the rounded layers before make of some images is compared with float32, and the difference of the means
    of each channel, before the activation, is made up for.

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
            found[layer.output] = _difference(layer, rounded, exact[layer.input], ours[layer.input])
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
    weight, bias = layer.tensors
    return layer._replace(tensors=(weight, bias + found[layer.output]))


def _of_rounded_weight(layer: Layer, x_levels: Levels) -> Layer:
    weight, bias = layer.tensors
    quantized, step = quantized_layer(layer, x_levels)
    real = (quantized * step[:, None, None, None]).to(weight.dtype)
    return layer._replace(tensors=(real.reshape(weight.shape).contiguous(), bias))


def _difference(layer: Layer, rounded: Layer, exact: Tensor, ours: Tensor) -> Tensor:
    lost: Tensor = _linear(layer)(exact, None) - _linear(rounded)(ours, None)
    return lost.mean((0, 2, 3) if lost.dim() == 4 else 0)


def _linear(layer: Layer) -> Layer:
    return layer._replace(activation=maps.IDENTITY, other=-1)
