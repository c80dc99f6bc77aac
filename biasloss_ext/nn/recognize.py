"""Identifies layers of other packages by what they compute, not by their names: they are run on numbers."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from biasloss_ext.nn.activations import number_of
from biasloss_ext.nn.chain import is_watched, watched
from biasloss_ext.ops import maps


def activation_of(layer: nn.Module) -> int | None:
    """The number of the activation that a layer applies; None if it is not a known activation.

    Layers that are not torch's own and have no state are run on numbers.
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


def norm_of(layer: nn.Module) -> int | str | None:
    """The activation that a normalization applies itself, as timm's BatchNormAct2d does; the identity for torch's own; or why
    it has no fused kernels. None if the layer is not a normalization of channels by a batch or by constants."""
    if isinstance(layer, _BatchNorm):
        if not isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
            return f"{type(layer).__name__} is not BatchNorm2d"
        if type(layer).forward in _NORM_FORWARDS:
            return maps.IDENTITY
        if is_norm_with_activation(layer):
            return activation_of_norm(layer)
        return f"{type(layer).__name__} may compute something else than BatchNorm2d"
    return maps.IDENTITY if is_frozen_norm(layer) else None


_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def is_frozen_norm(layer: nn.Module) -> bool:
    """Whether a layer normalizes by four constants per channel, like torchvision's FrozenBatchNorm2d."""
    names = {"weight", "bias", "running_mean", "running_var"}
    if layer._modules or layer._parameters or layer._buffers.keys() - {"num_batches_tracked"} != names:
        return False
    if not isinstance(getattr(layer, "eps", None), float):
        return False
    kind = type(layer)
    if kind not in _frozen:
        _frozen[kind] = _normalizes_by_constants(layer)
    return _frozen[kind]


_frozen: dict[type[nn.Module], bool] = {}


def _normalizes_by_constants(layer: Any) -> bool:
    """Tried on a copy."""
    channels = 3
    values = torch.linspace(-4.0, 4.0, 5 * channels).reshape(5, channels, 1, 1)
    try:
        twin = copy.deepcopy(layer).to("cpu").float()
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(twin, name, torch.linspace(0.5, 2.0, channels))
    except Exception:  # whatever its hooks or its own attributes raise
        return False
    expected = F.batch_norm(values, twin.running_mean, twin.running_var, twin.weight, twin.bias, False, 0.0, twin.eps)
    return _agree(lambda: kind_forward(twin, values), expected)


def kind_forward(layer: nn.Module, *arguments: Any) -> Any:
    """The result of the class's own forward, without hooks."""
    return type(layer).forward(layer, *arguments)


def is_channel_scale(layer: nn.Module) -> bool:
    """Whether a layer multiplies each channel of a map by a parameter, like timm's LayerScale2d."""
    if layer._modules or layer._buffers or len(layer._parameters) != 1:
        return False
    (parameter,) = layer._parameters.values()
    if parameter is None or parameter.numel() < 2 or parameter.numel() not in parameter.shape:
        return False
    key = (type(layer), parameter.dim())
    if key not in _scaling:
        _scaling[key] = _multiplies_channels(layer, parameter)
    return _scaling[key]


_scaling: dict[tuple[type[nn.Module], int], bool] = {}


def _multiplies_channels(layer: Any, parameter: Tensor) -> bool:
    """Tried on a copy."""
    channels = parameter.numel()
    values = torch.linspace(-4.0, 4.0, 4 * channels).reshape(2, channels, 2, 1)
    factors = torch.linspace(0.5, 2.0, channels)
    try:
        twin = copy.deepcopy(layer).to_empty(device="cpu").float()
        next(iter(twin.parameters())).data = factors.reshape(parameter.shape)
    except Exception:  # whatever its hooks or its own attributes raise
        return False
    return _agree(lambda: kind_forward(twin, values.clone()), values * factors[:, None, None])


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer computes what nn.Linear does, as timm's subclass of it."""
    if not isinstance(layer, nn.Linear) or layer._modules or layer._buffers:
        return False
    kind = type(layer)
    if kind not in _linear:
        values = torch.linspace(-4.0, 4.0, 3 * layer.in_features).reshape(3, -1).to(layer.weight)
        bias = layer.bias
        _linear[kind] = _agree(lambda: kind_forward(layer, values), F.linear(values, layer.weight, bias).detach())
    return _linear[kind]


_linear: dict[type[nn.Module], bool] = {nn.Linear: True}


def is_norm_with_activation(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm2d that applies its child ``act`` itself, as timm's BatchNormAct2d does; or a
    SyncBatchNorm, as timm's SyncBatchNormAct."""
    if not isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) or "act" not in module._modules:
        return False
    known = _applying.get(type(module))
    if known is None:
        known = _applying[type(module)] = _applies_its_activation(module)
    return known


_applying: dict[type[nn.Module], bool] = {}


def _applies_its_activation(norm: Any) -> bool:
    """Run a copy, in evaluation."""
    try:
        twin = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    except Exception:  # whatever its hooks or its own attributes raise
        return False
    channels = norm.num_features
    values = torch.linspace(-4.0, 4.0, 5 * channels).reshape(5, channels, 1, 1)
    for name, tensor in twin.state_dict().items():
        tensor.copy_(torch.tensor(3) if name == "num_batches_tracked" else torch.linspace(0.5, 2.0, channels))
    normalized = F.batch_norm(values, twin.running_mean, twin.running_var, twin.weight, twin.bias, False, 0.0, twin.eps)
    with _sync_batch_norm_on_cpu():
        return _agree(lambda: kind_forward(twin, values), twin.act(normalized))


@contextlib.contextmanager
def _sync_batch_norm_on_cpu() -> Iterator[None]:
    """Let SyncBatchNorm compute on CPUs in evaluation, in this thread; torch refuses."""
    original, thread = nn.SyncBatchNorm.forward, threading.get_ident()

    def forward(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        here = threading.get_ident() == thread and not self.training
        return nn.modules.batchnorm._BatchNorm.forward(self, x) if here else original(self, x)

    nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = original  # type: ignore[method-assign]


def activation_of_norm(norm: Any) -> int | str:
    """The activation of a normalization that may apply one, or why it has no fused kernels."""
    if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
        return "a normalization drops channels"
    if "act" not in norm._modules:
        return maps.IDENTITY
    for inner in norm.children():
        if is_watched(inner):
            return watched(inner)
    number = activation_of(norm.act)
    return f"the activation is {type(norm.act).__name__}" if number is None else number


def is_drop(layer: nn.Module) -> bool:
    """Whether a layer drops samples or elements in training and does nothing in evaluation."""
    return type(layer).__name__ in ("DropPath", "StochasticDepth") or isinstance(layer, nn.modules.dropout._DropoutNd)
