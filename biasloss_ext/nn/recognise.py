"""Finds the parts of depthwise-separable blocks, whoever wrote them: by what they compute, not by what they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from biasloss_ext.nn.activations import number_of
from biasloss_ext.nn.data_flow import Attention, Flow, Layer, Unfamiliar
from biasloss_ext.nn.depthwise_conv import DepthwiseConv2d
from biasloss_ext.nn.fused_block import Gate, Parts, is_watched, why_not_fusable
from biasloss_ext.nn.fused_inverted_residual import parts_of
from biasloss_ext.nn.inverted_residual import InvertedResidual
from biasloss_ext.ops import maps

MOST_CONVOLUTIONS = 5  # of a block: expansion, depthwise, projection and the two of an attention


class Found(NamedTuple):
    """A block's parts, whether its input is added to its output, and what its output passes through before that."""

    parts: Parts
    has_residual: bool
    drop: nn.Module | None = None


def activation_of(layer: nn.Module) -> int | None:
    """The number of the activation that a layer applies; None where it is no known activation.

    Layers of other classes than torch's, without any state, are tried on numbers.
    """
    kind = type(layer)
    number = number_of(layer)
    if number is not None or layer.__dict__.keys() - _STATELESS:
        return number
    if kind not in _activations:
        values = torch.cat((torch.linspace(-8.0, 8.0, 65), torch.tensor([-1e4, -100.0, 100.0, 1e4])))
        same = (
            known for known in maps.Activation if _agree(lambda: layer(values.clone()), maps.activate(values, known))
        )
        _activations[kind] = next(same, None)
    return None if layer._modules or layer._parameters or layer._buffers else _activations[kind]


_STATELESS = nn.Module().__dict__.keys() | {"inplace"}
_activations: dict[type[nn.Module], int | None] = {}


def _agree(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    with torch.no_grad():
        try:
            return torch.allclose(compute(), expected, rtol=1e-4, atol=1e-5)
        except Exception:  # whatever a layer of somebody else's raises for a sample of numbers
            return False


def _norm_of(norm: nn.Module) -> tuple[nn.BatchNorm2d, int]:
    """A normalization, and the activation that it applies itself, as timm's BatchNormAct2d does."""
    if type(norm).forward in _NORM_FORWARDS:
        return norm, maps.IDENTITY  # type: ignore[return-value]
    if not is_norm_with_activation(norm):
        raise Unfamiliar(f"{type(norm).__name__} may compute something else than BatchNorm2d")
    activation = activation_of_norm(norm)
    if isinstance(activation, str):
        raise Unfamiliar(activation)
    return norm, activation  # type: ignore[return-value]


_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def is_norm_with_activation(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm2d that applies its child ``act`` itself, as timm's BatchNormAct2d does."""
    if not isinstance(module, nn.BatchNorm2d) or "act" not in module._modules:
        return False
    known = _applying.get(type(module))
    if known is None:
        known = _applying[type(module)] = _applies_its_activation(module)
    return known


_applying: dict[type[nn.Module], bool] = {}


def _applies_its_activation(norm: Any) -> bool:
    """Tried on a copy, in evaluation."""
    try:
        twin = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    except Exception:  # whatever its hooks or its own attributes raise
        return False
    channels = norm.num_features
    values = torch.linspace(-4.0, 4.0, 5 * channels).reshape(5, channels, 1, 1)
    for name, tensor in twin.state_dict().items():
        tensor.copy_(torch.tensor(3) if name == "num_batches_tracked" else torch.linspace(0.5, 2.0, channels))
    normalized = F.batch_norm(values, twin.running_mean, twin.running_var, twin.weight, twin.bias, False, 0.0, twin.eps)
    return _agree(lambda: type(twin).forward(twin, values), twin.act(normalized))


def activation_of_norm(norm: Any) -> int | str:
    """The activation of a normalization that applies one, or why it has no fused kernels."""
    if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
        return "a normalization drops channels"
    for inner in norm.children():
        if is_watched(inner):
            return f"a {type(inner).__name__} has hooks or a forward method of its own"
    number = activation_of(norm.act)
    return f"the activation is {type(norm.act).__name__}" if number is None else number


def _is_drop(layer: nn.Module) -> bool:
    """Whether a layer drops samples or elements in training, and does nothing in evaluation."""
    return type(layer).__name__ in ("DropPath", "StochasticDepth") or isinstance(layer, nn.modules.dropout._DropoutNd)


def _gate(attention: Attention | None) -> Gate | None:
    if attention is None:
        return None
    for layer in (attention.reduce, attention.excite):
        if layer.bias is None:
            raise Unfamiliar("a layer of the attention has no bias")
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride, layer.groups) != ((1, 1), (1, 1), 1):
            raise Unfamiliar("an attention has a convolution larger than 1 x 1, or grouped")
    return Gate(*attention)


def _read(block: nn.Module) -> Found:
    flow = Flow(block, activation_of)
    main, has_residual = flow.residual(flow.result())
    main, drop = flow.dropped(main, _is_drop)
    if drop is not None and not has_residual:
        raise Unfamiliar(f"a {type(drop).__name__} follows the projection, and nothing is added to it")
    gated, project = flow.layer(main, _norm_of)
    if project.activation != maps.IDENTITY:
        raise Unfamiliar("an activation follows the projection")
    convolved, attention = flow.gated(gated)
    expanded, depthwise = flow.layer(convolved, _norm_of)
    expand: Layer | None = None
    if expanded is not flow.input:
        first, expand = flow.layer(expanded, _norm_of)
        if first is not flow.input:
            raise Unfamiliar("it has more layers than expansion, depthwise convolution and projection")
    flow.check_all_read()
    expansion: tuple[Any, ...] = (None, None, maps.IDENTITY) if expand is None else expand
    others = tuple(block.modules())[1:]
    parts = Parts._make((*expansion, *depthwise, _gate(attention), *project[:2], others))
    return Found(parts, has_residual, drop)


def is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | DepthwiseConv2d) and layer.groups == layer.in_channels > 1


def is_block(module: nn.Module) -> bool:
    """Whether the module has the layers of one block: a depthwise convolution and one to four others, and normalizations."""
    if isinstance(module, InvertedResidual):
        return True
    if not module._modules or (type(module) is nn.Sequential and len(module) == 1):
        return False
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | DepthwiseConv2d)]
    return (
        1 < len(convolutions) <= MOST_CONVOLUTIONS
        and sum(map(is_depthwise, convolutions)) == 1
        and any(isinstance(layer, _BatchNorm) for layer in module.modules())
    )


def is_sequence(module: nn.Module) -> bool:
    """Whether the module is a sequence of a convolution, a normalization and perhaps an activation, whatever its class."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    layers = list(module.children())
    return (
        len(layers) in (2, 3)
        and "forward" not in module.__dict__
        and isinstance(layers[0], nn.Conv2d)
        and type(layers[1]) is nn.BatchNorm2d
        and (len(layers) == 2 or not layers[2]._modules)
    )


def find(block: nn.Module) -> Found | str:
    """The parts of a block, or why it has no fused kernels."""
    if isinstance(block, InvertedResidual):
        parts = parts_of(block.conv)
        return parts if isinstance(parts, str) else Found(parts, block.has_residual)
    found = structure(block)
    return found if isinstance(found, str) else why_not_fusable(found.parts) or found


def structure(block: nn.Module) -> Found | str:
    """As `find`, whatever the attributes and hooks of the layers; tracing takes a few milliseconds."""
    if "forward" in block.__dict__:
        return "it has a forward method of its own"
    try:
        return _read(block)
    except Unfamiliar as unfamiliar:
        return str(unfamiliar)
