"""Parameters, buffers and inner layers of layers, at the cost of a dictionary lookup.

``module.weight`` ends in `nn.Module.__getattr__`, which takes a microsecond, and a block looks up thirty tensors per call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """``module.name``, a parameter of the layer."""
    parameters = module._parameters
    found: Tensor | None = parameters[name] if name in parameters else getattr(module, name)
    return found


def buffer(module: nn.Module, name: str) -> Tensor | None:
    """``module.name``, a buffer of the layer."""
    buffers = module._buffers
    found: Tensor | None = buffers[name] if name in buffers else getattr(module, name)
    return found


def child(module: nn.Module, name: str) -> Any:
    """``module.name``, an inner layer."""
    layers = module._modules
    return layers[name] if name in layers else getattr(module, name)


def children(module: nn.Module) -> list[Any]:
    """The inner layers, in order."""
    return list(module._modules.values())
