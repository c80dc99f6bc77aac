"""The activation that a module or a function applies, by the number that the ops take."""

from __future__ import annotations

from torch import nn

from biasloss_ext.ops import maps

# By class; `number_of` also knows the classes whose attributes matter.
ACTIVATIONS: dict[type[nn.Module], int] = {
    layer: number for number, of_torch in enumerate(maps.OF_TORCH) for layer in of_torch.layers
}
# By function, or by name for a method of a tensor.
FUNCTIONS: dict[object, int] = {
    function: number
    for number, of_torch in enumerate(maps.OF_TORCH)
    for function in (of_torch.function, *of_torch.others)
}
# By the argument `approximate` of nn.GELU and F.gelu.
FORMS_OF_GELU: dict[object, int] = {"none": maps.GELU, "tanh": maps.GELU_TANH}


def number_of(module: nn.Module) -> int | None:
    """The number of the activation that a layer of torch applies, or None if it applies none."""
    if type(module) is nn.GELU:
        return FORMS_OF_GELU.get(module.approximate)
    return ACTIVATIONS.get(type(module))
