"""``biasloss_ext::pool_variance_triton`` and its backward: one launch each. Deterministic, capturable in a CUDA graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.batch_norm.triton import SUMMED_LOADS
from biasloss_ext.ops.feature_variance.triton import WARPS, triton_dtype
from biasloss_ext.ops.library import accumulation_dtype, with_arguments_of
from biasloss_ext.ops.pool_variance import triton_kernels as kernels
from biasloss_ext.ops.pool_variance.reference import BackwardArguments
from biasloss_ext.ops.replay import empty, empty_strided
from biasloss_ext.ops.triton_launch import Launch, tickets

MERGED_SLICES = 128


_plans: dict[tuple[Any, ...], shared.Plan] = {}


class Cut(NamedTuple):
    """How samples are divided among programs."""

    shape: shared.Rows
    tiles: shared.Stream
    chunks: shared.Groups  # of a sample's positions

    @property
    def numbers(self) -> tuple[int, ...]:
        shape, tiles, chunks = self
        return shape.positions, shape.units, tiles.blocks, chunks.number, chunks.tiles * tiles.rows


def cut_of(x: Tensor) -> Cut:
    shape = shared.rows_of(x)
    tiles = shared.stream_of(shape, x, SUMMED_LOADS)
    return Cut(shape, tiles, shared.groups_of(shape.positions, tiles.rows, tiles.blocks * x.shape[0]))


def _constants(cut: Cut, x: Tensor) -> dict[str, Any]:
    return {"VECTOR": cut.shape.vector, **cut.tiles.meta}


def _forward_plan(x: Tensor, activation: int, want_variance: bool) -> shared.Plan:
    cut, samples = cut_of(x), x.shape[0]
    chunks, blocks, wide = cut.chunks.number, cut.tiles.blocks, accumulation_dtype(x.dtype)
    slices = chunks * blocks
    launch = Launch(
        kernels.pool_kernel,
        samples * slices,
        (samples, *cut.numbers),
        {
            "ACTIVATION": maps.checked_activation(activation),
            **_constants(cut, x),
            "CHUNKS": shared.merged_groups(chunks, cut.tiles.channels),
            "SLICES": MERGED_SLICES,
            "DTYPE": triton_dtype(wide),
            "num_warps": WARPS,
        },
    )
    return shared.Plan(
        launch,
        shared.strides_of(x.shape),
        wide,
        samples * chunks * x.shape[1] if chunks > 1 else 0,
        samples * (blocks + 1),
        4 * samples * slices if want_variance else 0,
    )


def pool_variance(
    x: Tensor, *, affine: Tensor | None = None, activation: int = 0, want_variance: bool = False
) -> tuple[Tensor, Tensor]:
    key = (x.shape, x.dtype, x.device, affine is None, activation, want_variance)
    plan = _plans.get(key)
    samples, channels = x.shape[:2]
    if plan is None:
        if x.numel() == 0:  # the mean of nothing
            nothing = x.new_full((samples, channels), torch.nan, dtype=accumulation_dtype(x.dtype))
            return nothing, nothing.new_full((samples if want_variance else 0,), torch.nan)
        plan = _plans[key] = _forward_plan(x, activation, want_variance)
    wide, device = plan.wide, x.device
    pooled = empty((samples, channels), wide, device)
    variance = empty((samples if want_variance else 0,), wide, device)
    plan.launch(
        shared.dense(x, plan.strides),
        shared.in_order(affine),
        pooled,
        variance,
        empty(plan.partials, wide, device) if plan.partials else None,
        empty(plan.partial_moments, wide, device) if plan.partial_moments else None,
        tickets(x, plan.tickets),
    )
    return pooled, variance


def _backward_plan(call: BackwardArguments) -> shared.Plan:
    x = call.x
    cut, samples = cut_of(x), x.shape[0]
    groups, wide = samples * cut.chunks.number, accumulation_dtype(x.dtype)
    launch = Launch(
        kernels.backward_kernel,
        groups * cut.tiles.blocks,
        (call.eps, samples, *cut.numbers),
        {
            "ACTIVATION": maps.checked_activation(call.activation),
            "FROZEN": call.frozen,
            **_constants(cut, x),
            "GROUPS": shared.merged_groups(groups, cut.tiles.channels),
            "DTYPE": triton_dtype(wide),
            "num_warps": WARPS,
        },
    )
    partials = 2 * groups * x.shape[1] if call.moments is not None else 0
    return shared.Plan(launch, shared.strides_of(x.shape), wide, partials, cut.tiles.blocks)


@with_arguments_of(BackwardArguments)
def pool_variance_backward(call: BackwardArguments) -> tuple[Tensor, Tensor]:
    pool_grad, x, affine, moments, *numbers = call
    key = ("backward", x.shape, x.dtype, x.device, affine is None, moments is None, *numbers)
    plan = _plans.get(key)
    if plan is None:
        if x.numel() == 0:
            return _of_nothing(call)
        plan = _plans[key] = _backward_plan(call)
    wide, device = plan.wide, x.device
    grad_x = empty_strided(x.shape, plan.strides, x.dtype, device)
    coefficients = empty((0,) if moments is None else (6, x.shape[1]), wide, device)
    plan.launch(
        pool_grad.contiguous(),
        shared.dense(x, plan.strides),
        shared.in_order(affine),
        shared.in_order(moments),
        grad_x,
        coefficients,
        empty(plan.partials, wide, device) if plan.partials else None,
        tickets(x, plan.tickets),
    )
    return grad_x, coefficients


def _of_nothing(call: BackwardArguments) -> tuple[Tensor, Tensor]:
    """For a map without elements."""
    x, affine, moments = call.x, call.affine, call.moments
    grad_x = maps.empty_map(x, *x.shape[1:])
    if affine is None or moments is None:
        return grad_x, maps.none_like(x)
    zeros = torch.zeros_like(moments)
    return grad_x, maps.finish_coefficients(zeros, affine, moments, 0, eps=call.eps, frozen=call.frozen)
