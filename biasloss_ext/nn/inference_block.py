"""Blocks and layers with everything constant prepared: for evaluation, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.fused_block import (
    Parts,
    autocast_input,
    expand_free,
    matrices_of,
    takes_fused_path,
)
from biasloss_ext.nn.pooling import average_to
from biasloss_ext.nn.recognise import Found
from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import op as depthwise
from biasloss_ext.ops.expand_depthwise import op as expand_depthwise
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool_variance
from biasloss_ext.ops.squeeze_excite import op as squeeze_excite

COLUMNS = 16  # that the kernels want a weight to be padded to, so that they take it as it lies


def packed(weight: Tensor) -> Tensor:
    """A (K, C, 1, 1) weight as a view of (C, K) memory whose rows are padded with zeros: what the product reads.

    Rows are an odd number of cache lines apart, so that they do not share the same sets of a cache."""
    outputs, inputs = weight.shape[:2]
    memory = weight.new_zeros(inputs, ((outputs + COLUMNS - 1) // COLUMNS | 1) * COLUMNS)
    memory[:, :outputs] = weight.flatten(1).T
    return memory[:, :outputs].T[:, :, None, None]


def taps_first(weight: Tensor) -> Tensor:
    """A (C, 1, k, k) weight as a view of (k, k, C) memory."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def constant_affine(norm: nn.BatchNorm2d, dtype: torch.dtype) -> Tensor:
    """Scale and shift (2, C) of a normalization by its running statistics.

    Raises:
        ValueError: it has none.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a normalization without running statistics cannot be folded: track_running_stats is False")
    return batch_norm.constant_statistics(norm, dtype)[2:].contiguous()


def refuse_state_dict(*_: Any) -> None:
    """Also as a hook, before anything is loaded."""
    raise RuntimeError(
        "a model from optimize_for_inference takes no state_dict, since its tensors are prepared from it: load it into the model "
        "that this one was made of, and optimize that again"
    )


class Prepared(nn.Module):
    """Runs `plain` from tensors that are made of it once, and again whenever it is moved or converted.

    `plain` is a child; where no kernels can run it runs itself.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain
        self.train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        self.prepare()
        return moved

    def prepare(self) -> None:
        raise AssertionError("each kind has its own")

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        refuse_state_dict()

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError("a model from optimize_for_inference cannot be trained; train the one it was made of")
        return super().train(False)


class InferenceBlock(Prepared):
    """A depthwise-separable block, from its `Found`: two to four ops, five where expansion and depthwise are apart."""

    def __init__(self, plain: nn.Module, found: Found) -> None:
        super().__init__(plain)
        self.parts: Parts = found.parts
        self.has_residual = found.has_residual
        self.prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        parts = self.parts
        dtype = accumulation_dtype(parts.project.weight.dtype)
        self.depthwise = parts.depthwise.weight.detach().to(dtype).contiguous()
        self.affine2 = constant_affine(parts.depthwise_norm, dtype)
        scale, shift = constant_affine(parts.project_norm, dtype)
        self.project, self.bias = (
            packed(parts.project.weight.to(dtype) * scale[:, None, None, None]),
            shift.contiguous(),
        )
        self.expand = self.affine1 = self.taps = self.gate = None
        if parts.expand is not None and parts.expand_norm is not None:
            self.expand = packed(parts.expand.weight.detach().to(dtype))
            self.affine1 = constant_affine(parts.expand_norm, dtype)
            self.taps = taps_first(self.depthwise)
        if parts.gate is not None:
            self.gate = [t.detach().to(dtype).contiguous() for t in matrices_of(parts.gate)]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, None)

    def _hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The depthwise convolution's result; what is to be applied to it on load, None where it has been; and the pooled
        activations, where there is a gate for them."""
        parts = self.parts
        stride, activation = parts.depthwise.stride[0], parts.depthwise_activation
        if self.taps is not None and expand_free(x, "auto"):
            h, pooled = expand_depthwise.activate(
                x,
                self.expand,
                self.affine1,
                self.taps,
                self.affine2,
                activation=parts.expand_activation,
                stride=stride,
                y_activation=activation,
                want_pool=self.gate is not None,
            )
            return h, None, pooled
        if self.expand is not None:
            x, _ = pointwise.forward(x, self.expand)
        y, _ = depthwise.forward(
            x, self.depthwise, affine=self.affine1, activation=parts.expand_activation, stride=stride
        )
        if self.gate is None:
            return y, self.affine2, None
        pooled, _ = pool_variance.forward(y, affine=self.affine2, activation=activation)
        return y, self.affine2, pooled

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """``block(x) + residual``, or as the block itself adds its input."""
        if not takes_fused_path(x, "auto", None, type(self).__name__):
            result: Tensor = self.plain(x)
            return result
        x = autocast_input(x)
        parts = self.parts
        y, affine, pooled = self._hidden(x)
        gate = None
        if self.gate is not None and parts.gate is not None:
            gate, _, _ = squeeze_excite.forward(
                pooled, *self.gate, activation=parts.gate.activation, gate_activation=parts.gate.gate_activation
            )
        if residual is None:
            residual = x if self.has_residual else None
        else:
            residual = maps.channels_last(residual.to(y.dtype))
        out: Tensor = pointwise.forward(
            y,
            self.project,
            affine=affine,
            activation=maps.IDENTITY if affine is None else parts.depthwise_activation,
            gate=gate,
            bias=self.bias,
            residual=residual,
        )[0]
        return out


class InferenceSkipBlock(InferenceBlock):
    """`SkipBlock`, prepared."""

    def forward(self, early: Tensor, later: Tensor) -> Tensor:  # type: ignore[override]
        if not takes_fused_path(early, "auto", None, type(self).__name__):
            result: Tensor = self.plain(early, later)
            return result
        return self.run(average_to(early, (later.shape[-2], later.shape[-1])), later)


class InferenceConvNorm(Prepared):
    """Convolution, batch normalization and activation, prepared; `plain` is a `FusedConvNormActivation`."""

    def __init__(self, plain: nn.Module, activation: int, is_pointwise: bool) -> None:
        super().__init__(plain)
        self.activation, self.is_pointwise = activation, is_pointwise
        self.prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        conv, norm = self.plain[0], self.plain[1]  # type: ignore[index]
        dtype = accumulation_dtype(conv.weight.dtype)
        self.affine = constant_affine(norm, dtype)
        scale, shift = self.affine
        folded = conv.weight.to(dtype) * scale[:, None, None, None]
        self.weight = packed(folded) if self.is_pointwise else maps.channels_last(folded.to(conv.weight.dtype))
        bias = 0 if conv.bias is None else conv.bias.to(dtype) * scale
        self.bias = (shift + bias).to(dtype if self.is_pointwise else conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not takes_fused_path(x, "auto", None, type(self).__name__):
            result: Tensor = self.plain(x)
            return result
        x = autocast_input(x)
        if self.is_pointwise:
            y: Tensor = pointwise.forward(x, self.weight, bias=self.bias, output_activation=self.activation)[0]
            return y
        return maps.channels_last(maps.activate(self._convolve(x), self.activation))

    def _convolve(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.plain[0]._conv_forward(x, self.weight, self.bias)  # type: ignore[index, operator]
        return convolved

    def can_pool(self, x: Tensor) -> bool:
        hooked = self._forward_hooks or self._forward_pre_hooks
        return self.is_pointwise and not hooked and takes_fused_path(x, "auto", None, type(self).__name__)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `FusedHead.pool`."""
        x = autocast_input(x)
        y, _ = pointwise.forward(x, self.weight, bias=self.bias)
        pooled, variance = pool_variance.forward(y, activation=self.activation, want_variance=True)
        return pooled, variance


__all__ = ["InferenceBlock", "InferenceConvNorm", "InferenceSkipBlock"]
