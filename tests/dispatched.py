"""Counts what PyTorch's own kernels compute of a model: convolutions and normalizations, by kind."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from biasloss_ext.report import DEPTHWISE, NORMALIZATION, POINTWISE

NORMS = {
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_native_batch_norm_legit.no_stats",
    "aten::_batch_norm_with_update",
    "aten::_batch_norm_no_update",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
}


class Dispatched(TorchDispatchMode):
    """The calls of convolutions and normalizations that reach PyTorch's kernels while it is active, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        name = function.name()
        if name.startswith("aten::convolution") and "backward" not in name:
            self._convolution(arguments[1], arguments[8])
        elif name in NORMS:
            self.calls[NORMALIZATION] += 1
        return function(*arguments, **(options or {}))

    def _convolution(self, weight: torch.Tensor, groups: int) -> None:
        if groups > 1 and weight.shape[1] == 1:
            self.calls[DEPTHWISE] += 1
        elif groups == 1 and weight.shape[2:] == (1, 1):
            self.calls[POINTWISE] += 1


def dispatched(model: nn.Module, images: torch.Tensor) -> collections.Counter[str]:
    """What PyTorch's kernels compute of one forward pass, without gradients."""
    with torch.no_grad(), Dispatched() as counter:
        model(images)
    return counter.calls
