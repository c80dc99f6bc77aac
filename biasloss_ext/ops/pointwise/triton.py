"""``biasloss_ext::pointwise_triton``: one launch, whose last programs finish the normalization that follows.

Deterministic, capturable in a CUDA graph. What does not depend on the values of tensors is worked out by the first call for
their shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.feature_variance.triton import triton_dtype
from biasloss_ext.ops.library import accumulation_dtype, with_arguments_of
from biasloss_ext.ops.pointwise import triton_kernels as kernels
from biasloss_ext.ops.pointwise import triton_tiles as tiling
from biasloss_ext.ops.pointwise.reference import Arguments
from biasloss_ext.ops.pointwise.triton_backward import pointwise_backward
from biasloss_ext.ops.replay import empty, empty_strided
from biasloss_ext.ops.triton_launch import Launch, divide_up, tickets

__all__ = ["pointwise", "pointwise_backward"]


class Plan(NamedTuple):
    """A launch for tensors of some shapes and dtypes, and what is to be allocated for it."""

    launch: Launch
    x_strides: tuple[int, ...]
    y_shape: tuple[int, ...]
    y_strides: tuple[int, ...]
    wide: torch.dtype
    statistics: tuple[int, ...]
    partials: int
    tickets: int


_plans: dict[tuple[Any, ...], Plan] = {}


@with_arguments_of(Arguments, norm=maps.Norm)
def pointwise(call: Arguments) -> tuple[Tensor, Tensor]:
    x, weight, affine, activation, gate, bias, output_activation, residual, want_statistics, norm = call
    *tensors, momentum, eps = norm
    given = shared.dtypes_of(x, weight, affine, gate, bias, residual, *tensors)
    numbers = activation, output_activation, want_statistics, momentum, eps
    key = (x.shape, x.device, weight.shape, weight.stride(), given, numbers, shared.precision_setting(x))
    plan = _plans.get(key)
    if plan is None:
        if x.shape[0] * x.shape[2] * x.shape[3] * weight.shape[0] == 0:
            return _of_nothing(call)
        plan = _plans[key] = _plan(call)
    x = shared.dense(x, plan.x_strides)
    y = empty_strided(plan.y_shape, plan.y_strides, x.dtype, x.device)
    statistics = empty(plan.statistics, plan.wide, x.device)
    plan.launch(
        x,
        weight,
        shared.in_order(affine),
        shared.in_order(gate),
        shared.in_order(bias),
        None if residual is None else shared.dense(residual, plan.y_strides),
        y,
        *((statistics, *tensors) if want_statistics else (None,) * 6),
        empty(plan.partials, plan.wide, x.device) if want_statistics else None,
        tickets(x, plan.tickets) if want_statistics else None,
    )
    return y, statistics


def _plan(call: Arguments) -> Plan:
    x, weight = call.x, call.weight
    of_x, of_y = shared.rows_of(x), shared.rows_of(x, weight.shape[0])
    tiles = tiling.forward_tiles(x.dtype, of_y.channels, of_x.channels)
    blocks = divide_up(of_y.channels, tiles.results)
    groups = tiling.groups_of(of_x.rows, tiles.rows, blocks, longest=tiling.LONGEST_GROUP)
    (out_units, in_units), weight_strides = tiling.stride_constants(weight)
    wide = accumulation_dtype(x.dtype)
    launch = Launch(
        kernels.forward_kernel,
        blocks * groups.number,
        (
            call.norm.momentum,
            call.norm.eps,
            of_x.rows,
            of_x.positions,
            of_x.units,
            of_y.units,
            out_units,
            in_units,
            blocks,
            groups.number,
            groups.tiles,
        ),
        {
            "ACTIVATION": call.activation,
            "OUTPUT_ACTIVATION": call.output_activation,
            "IN_VECTOR": of_x.vector,
            "OUT_VECTOR": of_y.vector,
            **weight_strides,
            "ROWS": tiles.rows,
            "IN": tiles.inner,
            "OUT": tiles.results,
            "WHOLE": tiles.whole,
            "GROUPS": shared.merged_groups(groups.number, tiles.results),
            "DTYPE": triton_dtype(wide),
            **shared.precision_of_products(x),
            **tiles.options,
        },
    )
    return Plan(
        launch,
        shared.strides_of(x.shape),
        (x.shape[0], of_y.channels, *x.shape[2:]),
        shared.strides_of((x.shape[0], of_y.channels, *x.shape[2:])),
        wide,
        (4, of_y.channels) if call.want_statistics else (0,),
        (3 * of_y.channels + 1) * groups.number,
        blocks,
    )


def _of_nothing(call: Arguments) -> tuple[Tensor, Tensor]:
    """For a map without elements."""
    x, channels = call.x, call.weight.shape[0]
    y = maps.empty_map(x, channels, *x.shape[2:])
    if not call.want_statistics:
        return y, maps.none_like(x)
    return y, shared.statistics_of_nothing(x, channels, **call.norm._asdict())
