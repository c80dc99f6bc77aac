"""Convolution, batch normalisation and activation on the fused ops: stems, heads and single 1x1 layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.fused_block import (
    ACTIVATIONS,
    Fused,
    autocast_input,
    takes_fused_path,
)
from biasloss_ext.nn.norm_functions import NormActivation, NormOptions, NormPool, Pointwise
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm_op
from biasloss_ext.ops.library import accumulation_dtype


def why_not_fusable(conv: nn.Module, norm: nn.Module, activation: type[nn.Module]) -> str | None:
    """What about the layer has no fused kernels, or None."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not Conv2d"
    if type(norm) is not nn.BatchNorm2d:
        return f"{type(norm).__name__} is not BatchNorm2d"
    if activation not in ACTIVATIONS:
        return f"the activation is {activation.__name__}"
    return None


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether the op `pointwise` computes this convolution."""
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1
    return plain and conv.bias is None and conv.padding in ((0, 0), 0)


def convolve(x: Tensor, conv: nn.Conv2d, want_moments: bool) -> tuple[Tensor, Tensor | None]:
    """y, channels_last, and its moments where wanted: for free where the convolution is 1x1, by a pass over y elsewhere."""
    if is_pointwise(conv):
        y, moments = Pointwise.apply(BACKEND, want_moments, autocast_input(x), conv.weight)
        return y, moments if want_moments else None
    y = maps.channels_last(conv(x))
    return y, batch_norm_op.moments(y.detach(), device=y.device) if want_moments else None


BACKEND = "auto"


def _statistics(y: Tensor, norm: nn.BatchNorm2d, seen: Tensor | None) -> Tensor:
    """The moments to normalise with; running statistics are moved where the batch's own are taken."""
    if seen is None:
        return batch_norm.running_moments(norm, accumulation_dtype(y.dtype))
    batch_norm.update_running(norm, seen, y.numel() // max(y.shape[1], 1))
    return seen


def norm_options(norm: nn.BatchNorm2d, activation: int) -> NormOptions:
    return NormOptions(activation, norm.eps, not batch_norm.uses_batch_statistics(norm), BACKEND)


def norm_activation(y: Tensor, norm: nn.BatchNorm2d, activation: int, seen: Tensor | None = None) -> Tensor:
    """``act(norm(y))``; ``seen`` are y's moments where they are known already. y is channels_last."""
    if seen is None and batch_norm.uses_batch_statistics(norm):
        seen = batch_norm_op.moments(y.detach(), device=y.device)
    moments = _statistics(y, norm, seen)
    with torch.autocast(y.device.type, enabled=False):
        h: Tensor = NormActivation.apply(norm_options(norm, activation), y, moments, norm.weight, norm.bias)
    return h


class FusedConvNormActivation(nn.Sequential):
    """A sequence of convolution, batch normalisation and (perhaps) activation, with the latter two in one pass each way.

    Input and output as of the plain sequence; the output is channels_last. Parameters and names are the sequence's.

    Args:
        layers: nn.Conv2d, nn.BatchNorm2d and at most one activation; they are shared, not copied.
        fused: "auto" takes the plain layers where no kernels can run or a graph is exported; True raises instead.

    Raises:
        ValueError: ``fused`` is True, and the layers have no fused kernels.
    """

    def __init__(self, *layers: nn.Module, fused: Fused = "auto") -> None:
        super().__init__(*layers)
        self.fused = fused
        objection = self.objection()
        if objection is not None and fused is True:
            raise ValueError(f"{type(self).__name__} has no fused kernels: {objection}")

    def objection(self) -> str | None:
        """Why the layers have no fused kernels, or None. Asked at each call, as the layers may have been exchanged."""
        return why_not_fusable(self[0], self[1], self._activation())

    def _activation(self) -> type[nn.Module]:
        return type(self[2]) if len(self) > 2 else nn.Identity

    def _number(self) -> int:
        return ACTIVATIONS[self._activation()]

    def _layers(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        return self[0], self[1]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if not takes_fused_path(x, self.fused, self.objection(), type(self).__name__):
            plain: Tensor = super().forward(x)
            return plain
        conv, norm = self._layers()
        y, seen = convolve(x, conv, batch_norm.uses_batch_statistics(norm))
        return norm_activation(y, norm, self._number(), seen)


class FusedHead(FusedConvNormActivation):
    """The last convolution of a network: either its map, or at once the two numbers that are wanted of it."""

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Global average pool (N, C) and per-sample variance (N,) of what `forward` returns, without storing that.

        Both are float32 (float64 for float64 maps), the variance (:func:`biasloss_ext.feature_variance`) detached.
        """
        conv, norm = self._layers()
        y, seen = convolve(x, conv, batch_norm.uses_batch_statistics(norm))
        moments = _statistics(y, norm, seen)
        with torch.autocast(y.device.type, enabled=False):
            pooled, variance = NormPool.apply(norm_options(norm, self._number()), y, moments, norm.weight, norm.bias)
        return pooled, variance

    def can_pool(self, x: Tensor) -> bool:
        """Whether `pool` serves this input; otherwise, and where a hook waits for the map, take the map and pool that."""
        hooked = self._forward_hooks or self._forward_pre_hooks
        return not hooked and takes_fused_path(x, self.fused, self.objection(), type(self).__name__)
