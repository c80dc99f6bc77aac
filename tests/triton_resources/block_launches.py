"""Launches of the blocks' ops that SkipblockNet-M's training and inference make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import triton as batch_norm
from biasloss_ext.ops.pointwise import triton as pointwise
from biasloss_ext.ops.pool_variance import triton as pool
from biasloss_ext.ops.squeeze_excite import triton as squeeze_excite

BF16, F32 = torch.bfloat16, torch.float32
SAMPLES = 256  # decides how many programs share a result, and so which kernels are taken


def feature_map(channels: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(SAMPLES, channels, size, size, dtype=dtype, memory_format=torch.channels_last)


def norm_of(channels: int) -> dict[str, Any]:
    names = ("norm_weight", "norm_bias", "running_mean", "running_var")
    counter = torch.zeros((), dtype=torch.int64)
    return {**{name: torch.empty(channels) for name in names}, "num_batches_tracked": counter}


def forward(dtype: torch.dtype, inputs: int, outputs: int, size: int, activation: int, gated: bool = False) -> None:
    x, weight, affine = feature_map(inputs, size, dtype), torch.empty(outputs, inputs, 1, 1), torch.empty(2, inputs)
    pointwise.pointwise(
        x,
        weight,
        affine=affine,
        activation=activation,
        gate=torch.empty(SAMPLES, inputs) if gated else None,
        want_statistics=True,
        **norm_of(outputs),
    )


def backward(dtype: torch.dtype, inputs: int, outputs: int, size: int, activation: int, gated: bool = False) -> None:
    x, y, affine = feature_map(inputs, size, dtype), feature_map(outputs, size, dtype), torch.empty(2, inputs)
    pointwise.pointwise_backward(
        y,
        x,
        torch.empty(outputs, inputs, 1, 1),
        y=y,
        y_coefficients=torch.empty(6, outputs),
        affine=affine,
        moments=affine,
        activation=activation,
        gate=torch.empty(SAMPLES, inputs) if gated else None,
    )


def plain_backward(dtype: torch.dtype, inputs: int, outputs: int, size: int) -> None:
    """Of a block's first convolution: no normalization before it, a residual's gradient added."""
    x, y = feature_map(inputs, size, dtype), feature_map(outputs, size, dtype)
    pointwise.pointwise_backward(
        y,
        x,
        torch.empty(outputs, inputs, 1, 1),
        y=y,
        y_coefficients=torch.empty(6, outputs),
        residual_grad=x,
        any_origin=True,
    )


def inference(dtype: torch.dtype, inputs: int, outputs: int, size: int) -> None:
    """Normalization folded away; bias, activation and residual in the epilogue."""
    x, y = feature_map(inputs, size, dtype), feature_map(outputs, size, dtype)
    weight, bias = torch.empty(outputs, inputs, 1, 1), torch.empty(outputs)
    pointwise.pointwise(x, weight, bias=bias, output_activation=maps.HARDSWISH, residual=y)


def normalization(dtype: torch.dtype, channels: int, size: int) -> None:
    y, affine, coefficients = feature_map(channels, size, dtype), torch.empty(2, channels), torch.empty(6, channels)
    norm = norm_of(channels)
    batch_norm.batch_norm_statistics(y, **norm)
    batch_norm.batch_norm_affine(affine, 1000, **norm)
    batch_norm.batch_norm_apply(y, affine, activation=maps.HARDSWISH, residual=y)
    batch_norm.batch_norm_coefficients(y, y, affine, affine, activation=maps.HARDSWISH)
    batch_norm.batch_norm_backward(y, y, affine, coefficients, activation=maps.HARDSWISH)


def pooling(dtype: torch.dtype, channels: int, size: int) -> None:
    x, affine, pooled = feature_map(channels, size, dtype), torch.empty(2, channels), torch.empty(SAMPLES, channels)
    pool.pool_variance(x, affine=affine, activation=maps.HARDSWISH, want_variance=True)
    pool.pool_variance_backward(pooled, x, affine=affine, moments=affine, activation=maps.HARDSWISH)


def gate(channels: int, reduced: int) -> None:
    pooled, hidden = torch.empty(SAMPLES, channels), torch.empty(SAMPLES, reduced)
    reduce, expand = torch.empty(reduced, channels), torch.empty(channels, reduced)
    activations = {"activation": maps.RELU, "gate_activation": maps.HARDSIGMOID}
    squeeze_excite.squeeze_excite(pooled, reduce, torch.empty(reduced), expand, torch.empty(channels), **activations)
    affine = torch.empty(2, channels)
    squeeze_excite.squeeze_excite_backward(
        pooled,
        pooled,
        hidden,
        pooled,
        reduce,
        expand,
        sums=torch.empty(4, SAMPLES, channels),
        affine=affine,
        moments=affine,
        positions=49,
        **activations,
    )


def of_both(step: Callable[..., None]) -> dict[str, Callable[[], None]]:
    """In both dtypes, on shapes that differ in what bounds the kernel."""
    return {
        f"{step.__name__} {inputs} to {outputs} at {size} {str(dtype)[6:]}": (
            lambda dtype=dtype, inputs=inputs, outputs=outputs, size=size, gated=gated: step(
                dtype, inputs, outputs, size, maps.HARDSWISH if gated or inputs > outputs else maps.IDENTITY, gated
            )
        )
        for dtype in (BF16, F32)
        for inputs, outputs, size, gated in (
            (16, 64, 112, False),
            (64, 24, 56, False),
            (24, 72, 56, False),
            (240, 40, 28, True),
            (112, 672, 14, False),
            (960, 160, 7, True),
        )
    }


BLOCK_LAUNCHES: dict[str, Callable[[], Any]] = {
    **of_both(forward),
    **of_both(backward),
    "plain backward 24 to 72 at 56 bfloat16": lambda: plain_backward(BF16, 24, 72, 56),
    "inference 72 to 24 at 56 bfloat16": lambda: inference(BF16, 72, 24, 56),
    "batch norm 72 at 56 bfloat16": lambda: normalization(BF16, 72, 56),
    "batch norm 72 at 56 float32": lambda: normalization(F32, 72, 56),
    "pool 960 at 7 bfloat16": lambda: pooling(BF16, 960, 7),
    "pool 120 at 28 float32": lambda: pooling(F32, 120, 28),
    "gate 672 by 168": lambda: gate(672, 168),
}
