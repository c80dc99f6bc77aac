"""Whether an operation runs now, or is recorded or transformed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

functorch_is_active = torch._C._are_functorch_transforms_active


def exporting(x: Tensor) -> bool:
    """Whether a graph is being recorded that must not need this package, so that its layers must be plain."""
    return isinstance(x, torch.fx.Proxy) or is_exporting() or torch.jit.is_tracing()


def transformed(*tensors: Tensor | None) -> bool:
    """Whether the tensors are under a transform of torch.func, or carry forward-mode derivatives."""
    if functorch_is_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_exporting() -> bool:
    """Whether `torch.export` runs. ``torch.compiler.is_exporting()`` is also true in every compiled function of torch 2.11."""
    return torch.compiler._is_exporting_flag


def has_autocast(device_type: str) -> bool:
    """`torch.amp.is_autocast_available`, which Dynamo of torch 2.11 does not trace."""
    return torch.amp.is_autocast_available(device_type)


has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]
