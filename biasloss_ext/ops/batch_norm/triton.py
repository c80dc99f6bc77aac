"""``biasloss_ext::batch_norm_moments_triton``, ``_apply_triton``, ``_sums_triton``, ``_backward_triton``: the launches.

Two launches where something is summed over rows, one otherwise. Deterministic, capturable in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.batch_norm import triton_kernels as kernels
from biasloss_ext.ops.feature_variance.triton import WARPS, triton_dtype
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.maps import channels_last, empty_map

SUMMED_LOADS = 2  # 16-byte loads a thread and map, where sums take registers too


def _meta(shape: shared.Rows, tiles: shared.Stream, y: Tensor) -> dict[str, Any]:
    dtype = triton_dtype(accumulation_dtype(y.dtype))
    return {"VECTOR": shape.vector, **tiles.meta, "DTYPE": dtype, "num_warps": WARPS}


def batch_norm_moments(y: Tensor) -> Tensor:
    y = channels_last(y)
    shape = shared.rows_of(y)
    if y.numel() == 0:
        return shared.accumulators(y, 2, shape.channels).zero_()
    moments = shared.accumulators(y, 2, shape.channels)
    tiles = shared.stream_of(shape, y, SUMMED_LOADS)
    groups = shared.groups_of(shape.rows, tiles.rows, tiles.blocks)
    partials = shared.partial_moments(y, groups.number, shape.channels)
    with torch.cuda.device_of(y):
        kernels.moments_kernel[(tiles.blocks * groups.number,)](
            y,
            partials,
            shape.rows,
            shape.units,
            tiles.blocks,
            groups.number,
            groups.tiles * tiles.rows,
            **_meta(shape, tiles, y),
        )
        shared.merge_moments(partials, moments[0], moments[1], groups.number, shape.channels, unbiased=False)
    return moments


def batch_norm_apply(y: Tensor, affine: Tensor, activation: int, residual: Tensor | None) -> Tensor:
    y, residual = channels_last(y), None if residual is None else channels_last(residual)
    h = empty_map(y, *y.shape[1:])
    if y.numel() == 0:
        return h
    shape = shared.rows_of(y)
    tiles = shared.stream_of(shape, y)
    with torch.cuda.device_of(y):
        kernels.apply_kernel[(tiles.blocks * triton.cdiv(shape.rows, tiles.rows),)](
            y,
            affine.contiguous(),
            residual,
            h,
            shape.rows,
            shape.units,
            tiles.blocks,
            ACTIVATION=activation,
            **_meta(shape, tiles, y),
        )
    return h


def batch_norm_sums(grad: Tensor, y: Tensor, affine: Tensor, center: Tensor, activation: int) -> Tensor:
    grad, y = channels_last(grad), channels_last(y)
    shape = shared.rows_of(y)
    sums = shared.accumulators(y, 2, shape.channels)
    if y.numel() == 0:
        return sums.zero_()
    tiles = shared.stream_of(shape, y, SUMMED_LOADS)
    groups = shared.groups_of(shape.rows, tiles.rows, tiles.blocks)
    partials = shared.accumulators(y, 2, groups.number, shape.channels)
    with torch.cuda.device_of(y):
        kernels.sums_kernel[(tiles.blocks * groups.number,)](
            grad,
            y,
            affine.contiguous(),
            center.contiguous(),
            partials,
            shape.rows,
            shape.units,
            tiles.blocks,
            groups.number,
            groups.tiles * tiles.rows,
            ACTIVATION=activation,
            **_meta(shape, tiles, y),
        )
        shared.sum_partials(partials, sums, 2, groups.number, shape.channels)
    return sums


def batch_norm_backward(grad: Tensor, y: Tensor, affine: Tensor, coefficients: Tensor, activation: int) -> Tensor:
    grad, y = channels_last(grad), channels_last(y)
    dy = empty_map(y, *y.shape[1:])
    if y.numel() == 0:
        return dy
    shape = shared.rows_of(y)
    tiles = shared.stream_of(shape, y)
    with torch.cuda.device_of(y):
        kernels.backward_kernel[(tiles.blocks * triton.cdiv(shape.rows, tiles.rows),)](
            grad,
            y,
            affine.contiguous(),
            coefficients.contiguous(),
            dy,
            shape.rows,
            shape.units,
            tiles.blocks,
            ACTIVATION=activation,
            **_meta(shape, tiles, y),
        )
    return dy
