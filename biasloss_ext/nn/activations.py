"""The activations of modules, by the numbers that the ops take."""

from __future__ import annotations

from torch import nn

from biasloss_ext.ops import maps

ACTIVATIONS: dict[type[nn.Module], int] = {
    nn.Identity: maps.IDENTITY,
    nn.ReLU: maps.RELU,
    nn.ReLU6: maps.RELU6,
    nn.Hardswish: maps.HARDSWISH,
    nn.SiLU: maps.SILU,
    nn.Hardsigmoid: maps.HARDSIGMOID,
    nn.Sigmoid: maps.SIGMOID,
}


def number_of(module: nn.Module) -> int | None:
    """The number of the activation that a module of torch applies; None where it is none that the ops apply."""
    return ACTIVATIONS.get(type(module))
