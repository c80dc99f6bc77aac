"""Convolution, batch normalization and activation in sequence, the latter two in one pass each way."""

from __future__ import annotations

from torch import Tensor, nn

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.activations import number_of
from biasloss_ext.nn.chain import Chain, Step, is_watched, watched, why_not_convolved
from biasloss_ext.nn.fused_chain import Fused, autocast_input, check_channels, fused_chain, takes_fused_path
from biasloss_ext.nn.members import children
from biasloss_ext.nn.norm_functions import NormOptions, NormPool, Pointwise, without_autocast
from biasloss_ext.nn.scripting import NotScriptable
from biasloss_ext.ops import maps
from biasloss_ext.ops.library import accumulation_dtype

BACKEND = "auto"
_IDENTITY = nn.Identity()


def why_not_fusable(conv: nn.Module, norm: nn.Module, activation: nn.Module) -> str | None:
    """Why the layers have no fused kernels, or None."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not Conv2d"
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return f"{type(norm).__name__} is not BatchNorm2d"
    if number_of(activation) is None:
        return f"the activation is {type(activation).__name__}"
    return None


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether the op `pointwise` computes this convolution."""
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1
    return plain and conv.bias is None and conv.padding in ((0, 0), 0)


class FusedConvNormActivation(NotScriptable, nn.Sequential):
    """A convolution, a batch normalization and an optional activation, the latter two in one pass each way.

    A 1x1 or depthwise convolution also runs on a fused kernel. Input and output are those of the plain sequence; the output is
    channels_last. The parameters keep the names of the sequence.

    Args:
        layers: `nn.Conv2d`, `nn.BatchNorm2d` and at most one activation; they are shared, not copied.
        fused: "auto" uses the plain layers if no kernels can run or a graph is exported; True raises instead.

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
        """Why the layers have no fused kernels, or None. Asked in each call, as the layers may have been exchanged."""
        layers = children(self)
        for layer in layers:
            if is_watched(layer):
                return watched(layer)
        return why_not_fusable(layers[0], layers[1], self._activation())

    def _activation(self) -> nn.Module:
        return self[2] if len(self) > 2 else _IDENTITY

    def _number(self) -> int:
        number = number_of(self._activation())
        assert number is not None
        return number

    def _layers(self) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        return self[0], self[1]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if not takes_fused_path(x, self.fused, self.objection(), type(self).__name__):
            plain: Tensor = super().forward(x)
            return plain
        conv, norm = self._layers()
        if why_not_convolved(conv) is None:
            return fused_chain(x, Chain((Step(conv, norm, self._number()),)))
        return fused_chain(conv(x), Chain((Step(None, norm, self._number()),)))


class FusedHead(FusedConvNormActivation):
    """The last convolution of a network: it returns its map, or the average pool and the variance of its map."""

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Global average pool (N, C) and per-sample variance (N,) of the map that `forward` returns, which is not stored.

        Both are float32 (float64 for float64 maps). The variance is that of `biasloss_ext.feature_variance`, detached.
        """
        conv, module = self._layers()
        check_channels(x, conv.in_channels)
        x = autocast_input(x)
        dtype, count = accumulation_dtype(x.dtype), x.numel() // max(x.shape[1], 1)
        norm = batch_norm.norm_of(module, dtype, count)
        y, statistics = Pointwise.apply(BACKEND, norm, x, conv.weight, module.weight, module.bias)
        if norm.frozen:
            statistics = batch_norm.constant_statistics(module, dtype, backend=BACKEND)
        elif norm.running is None:
            batch_norm.update_running(module, statistics, count)
        options = NormOptions(self._number(), norm, BACKEND)
        with without_autocast(x):
            pooled, variance = NormPool.apply(options, maps.channels_last(y), statistics, module.weight, module.bias)
        return pooled, variance

    def can_pool(self, x: Tensor) -> bool:
        """Whether `pool` takes this input. If not, or if a hook expects the map, compute the map and pool it."""
        if self._forward_hooks or self._forward_pre_hooks:
            return False
        conv, norm = self._layers()
        is_plain = type(norm) is nn.BatchNorm2d and isinstance(conv, nn.Conv2d) and is_pointwise(conv)
        return is_plain and takes_fused_path(x, self.fused, self.objection(), type(self).__name__)
