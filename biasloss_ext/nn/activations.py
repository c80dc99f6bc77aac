"""The activation that a module applies, by the number that the ops take."""

from __future__ import annotations

from torch import nn

from biasloss_ext.ops import maps

# By class, for classes whose attributes say nothing about what they compute; `number_of` knows the others, too.
ACTIVATIONS: dict[type[nn.Module], int] = {
    nn.Identity: maps.IDENTITY,
    nn.ReLU: maps.RELU,
    nn.ReLU6: maps.RELU6,
    nn.Hardswish: maps.HARDSWISH,
    nn.SiLU: maps.SILU,
    nn.Hardsigmoid: maps.HARDSIGMOID,
    nn.Sigmoid: maps.SIGMOID,
}
# What `approximate` of nn.GELU and F.gelu may be.
FORMS_OF_GELU: dict[object, int] = {"none": maps.GELU, "tanh": maps.GELU_TANH}


def number_of(module: nn.Module) -> int | None:
    """The number of the activation that a layer of torch's own applies; None where there is none."""
    if type(module) is nn.GELU:
        return FORMS_OF_GELU.get(module.approximate)
    return ACTIVATIONS.get(type(module))
