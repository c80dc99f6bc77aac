"""The activation that a module or a function applies, by the number that the ops take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from biasloss_ext.ops import maps

# By class, for classes whose attributes do not change what they compute; `number_of` also knows the others.
ACTIVATIONS: dict[type[nn.Module], int] = {
    nn.Identity: maps.IDENTITY,
    nn.ReLU: maps.RELU,
    nn.ReLU6: maps.RELU6,
    nn.Hardswish: maps.HARDSWISH,
    nn.SiLU: maps.SILU,
    nn.Hardsigmoid: maps.HARDSIGMOID,
    nn.Sigmoid: maps.SIGMOID,
}
# By function, or by name for a method of a tensor.
FUNCTIONS: dict[object, int] = {
    F.relu: maps.RELU,
    torch.relu: maps.RELU,
    F.relu6: maps.RELU6,
    F.hardswish: maps.HARDSWISH,
    F.silu: maps.SILU,
    F.gelu: maps.GELU,
    F.hardsigmoid: maps.HARDSIGMOID,
    F.sigmoid: maps.SIGMOID,
    torch.sigmoid: maps.SIGMOID,
    "relu": maps.RELU,
    "relu_": maps.RELU,
    "sigmoid": maps.SIGMOID,
    "sigmoid_": maps.SIGMOID,
}
# By the argument `approximate` of nn.GELU and F.gelu.
FORMS_OF_GELU: dict[object, int] = {"none": maps.GELU, "tanh": maps.GELU_TANH}


def number_of(module: nn.Module) -> int | None:
    """The number of the activation that a layer of torch applies, or None if it applies none."""
    if type(module) is nn.GELU:
        return FORMS_OF_GELU.get(module.approximate)
    return ACTIVATIONS.get(type(module))
