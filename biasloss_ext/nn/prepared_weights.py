"""The weights of a network's 1x1 convolutions in the 16 bits of autocast, cast in one launch per forward pass.

Triton's kernels also take float32 weights and round them the same way while loading, but then each program of a launch
rounds them and reads twice the bytes through the cache. The copies serve one forward pass and its backward pass. Each
forward pass makes new copies, since weights can change without a trace, through ``.data`` or by the replay of a CUDA graph.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from biasloss_ext.nn.members import parameter
from biasloss_ext.ops.backends import choose
from biasloss_ext.ops.registry import is_traced
from biasloss_ext.ops.tracing import exporting

NARROW = (torch.float16, torch.bfloat16)


class _Prepared(threading.local):
    copies: dict[int, Tensor] | None = None  # by the identity of the parameter, in this thread's forward pass


_prepared = _Prepared()


def begin(network: nn.Module, x: Tensor) -> bool:
    """Prepare the weights of ``network`` for a forward pass of images ``x``, if that pays. If so, the caller must call `end`."""
    if torch.compiler.is_compiling() or exporting(x) or _prepared.copies is not None:
        return False
    # The backend first: devices without kernels, such as meta, may have no autocast to ask.
    if is_traced(x) or choose("auto", x.device, "pointwise") != "triton":
        return False
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) not in NARROW:
        return False
    layers: list[nn.Module] | None = network.__dict__.get("_pointwise_layers")
    if layers is None:
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
        network.__dict__["_pointwise_layers"] = layers  # of layers exchanged later none is prepared
    weights = [weight for layer in layers if (weight := _plain_weight(layer, x)) is not None]
    dtype = torch.get_autocast_dtype(device)
    with torch.no_grad():
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
    _prepared.copies = {id(weight): copy for weight, copy in zip(weights, copies, strict=True)}
    return True


def end() -> None:
    _prepared.copies = None


def _plain_weight(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The weight, if it is a plain float32 tensor on the device of x; otherwise None."""
    weight = parameter(layer, "weight")
    if weight is None or type(weight) not in (Tensor, nn.Parameter) or weight.device != x.device:
        return None
    return weight if weight.dtype is torch.float32 else None


def prepared(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The copy of a weight for maps of ``dtype``; None if none was prepared."""
    copies = _prepared.copies
    found = None if copies is None else copies.get(id(weight))
    return found if found is not None and found.dtype is dtype else None
