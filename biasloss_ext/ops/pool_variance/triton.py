"""``biasloss_ext::pool_variance_triton`` and its backward: the launches.

One launch where a sample fits a program for each block of channels and the variance is not wanted, at most three otherwise;
backward two. Deterministic, capturable in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.batch_norm.triton import SUMMED_LOADS
from biasloss_ext.ops.feature_variance.triton import WARPS, triton_dtype
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.maps import channels_last, empty_map, none_like
from biasloss_ext.ops.pool_variance import triton_kernels as kernels


class Cut(NamedTuple):
    """How samples are divided among programs."""

    shape: shared.Rows
    tiles: shared.Stream
    chunks: shared.Groups  # of a sample's positions

    @property
    def arguments(self) -> tuple[int, ...]:
        shape, tiles, chunks = self
        return shape.positions, shape.units, tiles.blocks, chunks.number, chunks.tiles * tiles.rows


def cut_of(x: Tensor) -> Cut:
    shape = shared.rows_of(x)
    tiles = shared.stream_of(shape, x, SUMMED_LOADS)
    return Cut(shape, tiles, shared.groups_of(shape.positions, tiles.rows, tiles.blocks * x.shape[0]))


def _meta(cut: Cut, x: Tensor, activation: int) -> dict[str, Any]:
    return {
        "ACTIVATION": activation,
        "VECTOR": cut.shape.vector,
        **cut.tiles.meta,
        "DTYPE": triton_dtype(accumulation_dtype(x.dtype)),
        "num_warps": WARPS,
    }


def pool_variance(x: Tensor, affine: Tensor | None, activation: int, want_variance: bool) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    samples, channels = x.shape[:2]
    pooled = shared.accumulators(x, samples, channels)
    variance = shared.accumulators(x, samples) if want_variance else none_like(x)
    if x.numel() == 0:  # the mean of nothing
        return pooled.fill_(torch.nan), variance.fill_(torch.nan)
    cut = cut_of(x)
    chunks, slices = cut.chunks.number, cut.chunks.number * cut.tiles.blocks
    partial_pools = pooled if chunks == 1 else shared.accumulators(x, samples, chunks, channels)
    partials = shared.partial_moments(x, slices, samples) if want_variance else None
    with torch.cuda.device_of(x):
        kernels.pool_kernel[(samples * slices,)](
            x,
            shared.in_order(affine),
            partial_pools,
            partials,
            samples,
            *cut.arguments,
            **_meta(cut, x, activation),
        )
        if chunks > 1:
            shared.sum_partials(partial_pools, pooled, samples, chunks, channels)
        if partials is not None:
            shared.merge_moments(partials, None, variance, slices, samples, unbiased=True)
    return pooled, variance


def pool_variance_backward(
    pool_grad: Tensor, x: Tensor, affine: Tensor | None, center: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    x = channels_last(x)
    samples, channels = x.shape[:2]
    grad_x = empty_map(x, *x.shape[1:])
    sums = none_like(x) if center is None else shared.accumulators(x, 2, channels)
    if x.numel() == 0:
        return grad_x, sums.zero_()
    cut = cut_of(x)
    groups = samples * cut.chunks.number
    partials = None if center is None else shared.accumulators(x, 2, groups, channels)
    with torch.cuda.device_of(x):
        kernels.backward_kernel[(groups * cut.tiles.blocks,)](
            pool_grad.contiguous(),
            x,
            shared.in_order(affine),
            shared.in_order(center),
            grad_x,
            partials,
            samples,
            *cut.arguments,
            **_meta(cut, x, activation),
        )
        if partials is not None:
            shared.sum_partials(partials, sums, 2, groups, channels)
    return grad_x, sums
