"""Finds the parts of depthwise-separable blocks as torchvision, timm and this package write them.

The packages are told by the names of their classes and never imported. A recogniser returns a `Found`, or a sentence that says
what about the block has no fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from biasloss_ext.nn.fused_block import ACTIVATIONS, Gate, Parts, is_watched, why_not_fusable
from biasloss_ext.nn.fused_inverted_residual import parts_of
from biasloss_ext.nn.inverted_residual import InvertedResidual


class Found(NamedTuple):
    """A block's parts, whether its input is added to its output, and what its output passes through before that."""

    parts: Parts
    has_residual: bool
    drop: nn.Module | None = None


class _Odd(Exception):
    """Carries the sentence that says what has no fused kernels."""


def _activation(module: nn.Module | None) -> int:
    if module is None:
        return ACTIVATIONS[nn.Identity]
    # timm has activations of its own that are torch's under another class; what counts is the function's name.
    by_name = {kind.__name__.lower(): number for kind, number in ACTIVATIONS.items()}
    number = ACTIVATIONS.get(type(module), by_name.get(type(module).__name__.lower()))
    if number is None:
        raise _Odd(f"the activation is {type(module).__name__}")
    return number


def _convolution(module: nn.Module) -> nn.Conv2d:
    if type(module) is not nn.Conv2d:
        raise _Odd(f"a {type(module).__name__} stands where a Conv2d is expected")
    return module


def _layer(sequence: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d, int]:
    """Convolution, normalisation and activation of a Conv2dNormActivation of torchvision."""
    convolution, norm, *activation = sequence.children()
    return _convolution(convolution), norm, _activation(activation[0] if activation else None)


def _norm_of_timm(norm: Any) -> tuple[nn.BatchNorm2d, int]:
    """A BatchNormAct2d, which holds its activation."""
    if type(norm).__name__ != "BatchNormAct2d":
        raise _Odd(f"a {type(norm).__name__} stands where a BatchNormAct2d is expected")
    return norm, _activation(_without_drop(norm).act)


def _without_drop(norm: Any) -> Any:
    if not isinstance(norm.drop, nn.Identity):
        raise _Odd("a normalisation drops channels")
    return norm


def activation_of_norm(norm: nn.Module) -> int | str:
    """The activation of timm's BatchNormAct2d, or why it has no fused kernels."""
    try:
        activation = _activation(_without_drop(norm).act)
    except _Odd as odd:
        return str(odd)
    for inner in norm.children():
        if is_watched(inner):
            return f"a {type(inner).__name__} has hooks or a forward method of its own"
    return activation


def _gate(module: nn.Module, reduce: str, excite: str, activation: str, gate: str) -> Gate:
    first, second = (_convolution(getattr(module, name)) for name in (reduce, excite))
    if first.bias is None or second.bias is None:
        raise _Odd("a layer of the attention has no bias")
    return Gate(first, second, _activation(getattr(module, activation)), _activation(getattr(module, gate)))


def _gate_of_torchvision(module: nn.Module) -> Gate:
    return _gate(module, "fc1", "fc2", "activation", "scale_activation")


def _gate_of_timm(module: nn.Module) -> Gate | None:
    if isinstance(module, nn.Identity):
        return None
    if type(module).__name__ != "SqueezeExcite":
        raise _Odd(f"the attention is {type(module).__name__}")
    if getattr(module, "add_maxpool", False):
        raise _Odd("the attention takes maxima")
    return _gate(module, "conv_reduce", "conv_expand", "act1", "gate")


_Layer = tuple[nn.Conv2d, nn.BatchNorm2d, int]


def _parts(expand: _Layer | None, depthwise: _Layer, gate: Gate | None, project: _Layer) -> Parts:
    if project[2] != ACTIVATIONS[nn.Identity]:
        raise _Odd("an activation follows the projection")
    expansion = (None, None, ACTIVATIONS[nn.Identity]) if expand is None else expand
    others = ()  # `find` has them
    return Parts._make((*expansion, *depthwise, gate, *project[:2], others))


def _of_torchvision_v2(block: Any) -> Found:
    *layers, project, norm = block.conv
    expand = _layer(layers[0]) if len(layers) == 2 else None
    parts = _parts(expand, _layer(layers[-1]), None, (_convolution(project), norm, ACTIVATIONS[nn.Identity]))
    return Found(parts, bool(block.use_res_connect))


def _of_torchvision_v3(block: Any) -> Found:
    *layers, project = block.block
    gates = [layer for layer in layers if type(layer).__name__ == "SqueezeExcitation"]
    plain = [layer for layer in layers if layer not in gates]
    expand = _layer(plain[0]) if len(plain) == 2 else None
    gate = _gate_of_torchvision(gates[0]) if gates else None
    parts = _parts(expand, _layer(plain[-1]), gate, _layer(project))
    return Found(parts, bool(block.use_res_connect), getattr(block, "stochastic_depth", None))


def _of_timm_inverted_residual(block: Any) -> Found:
    _no_extras(block)
    parts = _parts(
        (_convolution(block.conv_pw), *_norm_of_timm(block.bn1)),
        (_convolution(block.conv_dw), *_norm_of_timm(block.bn2)),
        _gate_of_timm(block.se),
        (_convolution(block.conv_pwl), *_norm_of_timm(block.bn3)),
    )
    return Found(parts, bool(block.has_skip), block.drop_path)


def _of_timm_depthwise_separable(block: Any) -> Found:
    _no_extras(block)
    parts = _parts(
        None,
        (_convolution(block.conv_dw), *_norm_of_timm(block.bn1)),
        _gate_of_timm(block.se),
        (_convolution(block.conv_pw), *_norm_of_timm(block.bn2)),
    )
    return Found(parts, bool(block.has_skip), block.drop_path)


def _no_extras(block: Any) -> None:
    for name in ("conv_s2d", "bn_s2d", "aa", "layer_scale"):
        extra = getattr(block, name, None)
        if extra is not None and not isinstance(extra, nn.Identity):
            raise _Odd(f"it has a {type(extra).__name__} ({name})")


RECOGNISERS: dict[tuple[str, str], Callable[[Any], Found]] = {
    ("torchvision.models.mobilenetv2", "InvertedResidual"): _of_torchvision_v2,
    ("torchvision.models.mobilenetv3", "InvertedResidual"): _of_torchvision_v3,
    ("torchvision.models.efficientnet", "MBConv"): _of_torchvision_v3,
    ("timm.models._efficientnet_blocks", "InvertedResidual"): _of_timm_inverted_residual,
    ("timm.models._efficientnet_blocks", "DepthwiseSeparableConv"): _of_timm_depthwise_separable,
}


def is_block(module: nn.Module) -> bool:
    """Whether the module is a block that `find` knows."""
    return type(module) is InvertedResidual or _key(module) in RECOGNISERS


def _key(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def find(block: nn.Module) -> Found | str:
    """The parts of a block, or why it has no fused kernels."""
    try:
        if isinstance(block, InvertedResidual):
            parts = parts_of(block.conv)
            return parts if isinstance(parts, str) else Found(parts, block.has_residual)
        found = RECOGNISERS[_key(block)](block)
    except _Odd as odd:
        return str(odd)
    found = found._replace(parts=found.parts._replace(others=tuple(block.modules())[1:]))
    return why_not_fusable(found.parts) or found
