"""``biasloss_ext::batch_norm_*_triton``: one launch each.

Where something is summed over rows, the last program of each block of channels merges what the others left, in a fixed order,
and finishes the normalization. Deterministic, capturable in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.batch_norm import triton_kernels as kernels
from biasloss_ext.ops.feature_variance.triton import WARPS, triton_dtype
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.replay import empty, empty_strided
from biasloss_ext.ops.triton_launch import Launch, divide_up, tickets

SUMMED_LOADS = 2  # 16-byte loads a thread and map, where sums take registers too
CHANNELS_OF_AFFINE = 256


_plans: dict[tuple[Any, ...], shared.Plan] = {}


def _summing_plan(
    kernel: Any, y: Tensor, quantities: int, numbers: tuple[Any, ...], constants: dict[str, Any]
) -> shared.Plan:
    """For a kernel that sums over rows. ``quantities`` of partial results per channel and group."""
    shape = shared.rows_of(y)
    tiles = shared.stream_of(shape, y, SUMMED_LOADS)
    groups = shared.groups_of(shape.rows, tiles.rows, tiles.blocks)
    wide = accumulation_dtype(y.dtype)
    launch = Launch(
        kernel,
        tiles.blocks * groups.number,
        (*numbers, shape.rows, shape.units, tiles.blocks, groups.number, groups.tiles * tiles.rows),
        {
            **constants,
            "VECTOR": shape.vector,
            **tiles.meta,
            "GROUPS": shared.merged_groups(groups.number, tiles.channels),
            "DTYPE": triton_dtype(wide),
            "num_warps": WARPS,
        },
    )
    counts = groups.number if quantities == 3 else 0  # moments come with their counts
    partials = quantities * groups.number * shape.channels + counts
    return shared.Plan(launch, shared.strides_of(y.shape), wide, partials, tiles.blocks)


def _streaming_plan(kernel: Any, y: Tensor, activation: int) -> shared.Plan:
    """For a kernel that goes element by element."""
    shape = shared.rows_of(y)
    tiles = shared.stream_of(shape, y)
    wide = accumulation_dtype(y.dtype)
    launch = Launch(
        kernel,
        tiles.blocks * divide_up(shape.rows, tiles.rows),
        (shape.rows, shape.units, tiles.blocks),
        {
            "ACTIVATION": maps.checked_activation(activation),
            "VECTOR": shape.vector,
            **tiles.meta,
            "DTYPE": triton_dtype(wide),
            "num_warps": WARPS,
        },
    )
    return shared.Plan(launch, shared.strides_of(y.shape), wide, 0, 0)


def _stream(
    kernel: Any, key: tuple[Any, ...], y: Tensor, activation: int, operands: tuple[Tensor | None, ...]
) -> Tensor:
    """A map like y, element by element from the operands of the kernel: maps, and values (rows, C) of channels."""
    plan = _plans.get(key)
    if plan is None:
        if y.numel() == 0:
            return maps.empty_map(y, *y.shape[1:])
        plan = _plans[key] = _streaming_plan(kernel, y, activation)
    result = empty_strided(y.shape, plan.strides, y.dtype, y.device)
    in_order = [t if t is None else t.contiguous() if t.dim() == 2 else shared.dense(t, plan.strides) for t in operands]
    plan.launch(*in_order, result)
    return result


def batch_norm_statistics(y: Tensor, **norm: Any) -> Tensor:
    *tensors, momentum, eps = maps.Norm(**norm)
    key = ("statistics", y.shape, y.dtype, y.device, shared.dtypes_of(*tensors), momentum, eps)
    plan = _plans.get(key)
    if plan is None:
        if y.numel() == 0:
            return shared.statistics_of_nothing(y, y.shape[1], **norm)
        plan = _plans[key] = _summing_plan(kernels.statistics_kernel, y, 3, (momentum, eps), {})
    statistics = empty((4, y.shape[1]), plan.wide, y.device)
    partials = empty(plan.partials, plan.wide, y.device)
    plan.launch(shared.dense(y, plan.strides), statistics, *tensors, partials, tickets(y, plan.tickets))
    return statistics


def batch_norm_affine(moments: Tensor, count: int, **norm: Any) -> Tensor:
    if count == 0:
        norm["running_mean"] = norm["running_var"] = None
    *tensors, momentum, eps = maps.Norm(**norm)
    channels = moments.shape[1]
    key = ("affine", channels, moments.dtype, moments.device, count, shared.dtypes_of(*tensors), momentum, eps)
    plan = _plans.get(key)
    if plan is None:
        launch = Launch(
            kernels.affine_kernel,
            divide_up(max(channels, 1), CHANNELS_OF_AFFINE),
            (momentum, eps, channels, count),
            {"CHANNELS": CHANNELS_OF_AFFINE, "DTYPE": triton_dtype(moments.dtype), "num_warps": WARPS},
        )
        plan = _plans[key] = shared.Plan(launch, (), moments.dtype, 0, 0)
    statistics = empty((4, channels), moments.dtype, moments.device)
    plan.launch(moments.contiguous(), statistics, *tensors)
    return statistics


def batch_norm_apply(y: Tensor, affine: Tensor, *, activation: int = 0, residual: Tensor | None = None) -> Tensor:
    key = ("apply", y.shape, y.dtype, y.device, residual is None, activation)
    return _stream(kernels.apply_kernel, key, y, activation, (y, affine, residual))


def batch_norm_coefficients(
    grad: Tensor, y: Tensor, affine: Tensor, moments: Tensor, *, activation: int = 0, **back: Any
) -> Tensor:
    eps, frozen = maps.Back(**back)
    key = ("coefficients", y.shape, y.dtype, grad.dtype, y.device, activation, eps, frozen)
    plan = _plans.get(key)
    if plan is None:
        if y.numel() == 0:
            sums = torch.zeros_like(moments)
            return maps.finish_coefficients(sums, affine, moments, 0, **back)
        constants = {"ACTIVATION": maps.checked_activation(activation), "FROZEN": frozen}
        plan = _plans[key] = _summing_plan(kernels.coefficients_kernel, y, 2, (eps,), constants)
    coefficients = empty((6, y.shape[1]), plan.wide, y.device)
    partials = empty(plan.partials, plan.wide, y.device)
    plan.launch(
        shared.dense(grad, plan.strides),
        shared.dense(y, plan.strides),
        affine.contiguous(),
        moments.contiguous(),
        coefficients,
        partials,
        tickets(y, plan.tickets),
    )
    return coefficients


def batch_norm_backward(
    grad: Tensor, y: Tensor, affine: Tensor, coefficients: Tensor, *, activation: int = 0
) -> Tensor:
    key = ("backward", y.shape, y.dtype, grad.dtype, y.device, activation)
    return _stream(kernels.backward_kernel, key, y, activation, (grad, y, affine, coefficients))
