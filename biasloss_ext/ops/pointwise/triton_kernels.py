"""Triton kernel of the 1x1 convolution: a product of matrices, rows the positions, what goes before and after folded in.

The weight (out, in) is small and stays in the caches; a program takes one block of output channels over a group of row tiles,
so that it leaves one partial result for the moments however many rows there are. The last program of each block of output
channels merges them and finishes the normalization that follows. Neighboring programs take the other blocks of the same rows,
which are then read from the cache.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from biasloss_ext.ops.triton_finish import (
    Norm,
    columns_from,
    count_batch,
    finish_statistics,
    is_last,
    merge_moments,
)
from biasloss_ext.ops.triton_map_kernels import (
    Tile,
    activate,
    clear_outside,
    load_activated,
    load_channels,
    load_tile,
    offsets_of,
    product,
    store_moments,
    store_tile,
)


class Gated(NamedTuple):
    """Pointers of z = gate * act(affine(x)); affine and gate may be None."""

    x: Any
    affine: Any
    gate: Any


@triton.jit
def load_gated(
    source,
    tile,
    positions,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of z. Rows past the last hold what act makes of the shift."""
    z = load_activated(source.x, source.affine, tile, ACTIVATION, ROWS, CHANNELS, DTYPE)
    if source.gate is not None:
        first_sample = tile.first_row // positions
        position = (tile.first_row - first_sample * positions).to(tl.int32)
        sample = (position + tl.arange(0, ROWS)) // positions
        offsets = sample[:, None] * tile.channels + (tile.first_channel + tl.arange(0, CHANNELS))[None, :]
        _, inside = offsets_of(tile, ROWS, CHANNELS)
        z *= tl.load(source.gate + first_sample * tile.channels + offsets, mask=inside, other=0.0)
    return z


class WeightBlock(NamedTuple):
    """Where a block of a weight (outputs, inputs) begins."""

    first_out: Any
    outputs: Any
    first_in: Any
    inputs: Any


@triton.jit
def load_weight(weight_ptr, out_stride, in_stride, block, OUT: tl.constexpr, IN: tl.constexpr):
    """A block (OUT, IN), 0 past the last channels."""
    row = block.first_out + tl.arange(0, OUT)
    column = block.first_in + tl.arange(0, IN)
    inside = (row < block.outputs)[:, None] & (column < block.inputs)[None, :]
    return tl.load(weight_ptr + row[:, None] * out_stride + column[None, :] * in_stride, mask=inside, other=0.0)


@triton.jit
def stride_of(units, UNIT: tl.constexpr):
    """A stride as launches pass it: in units of UNIT elements, 0 where it is 1."""
    if UNIT == 0:
        return 1
    else:
        return units * UNIT


@triton.jit(
    do_not_specialize=[
        "rows",
        "positions",
        "in_units",
        "out_units",
        "weight_out_units",
        "weight_in_units",
        "out_blocks",
        "groups",
        "tiles_per_group",
    ]
)
def forward_kernel(
    x_ptr,
    weight_ptr,
    affine_ptr,
    gate_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    partials_ptr,
    tickets_ptr,
    momentum: tl.float64,
    eps: tl.float64,
    rows,
    positions,
    in_units,
    out_units,
    weight_out_units,
    weight_in_units,
    out_blocks,
    groups,
    tiles_per_group,
    ACTIVATION: tl.constexpr,
    OUTPUT_ACTIVATION: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    WEIGHT_OUT: tl.constexpr,
    WEIGHT_IN: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDED: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """WHOLE: one block holds all input channels, so that the weights are loaded but once."""
    program = tl.program_id(0)
    in_channels = in_units * IN_VECTOR
    out_channels = out_units * OUT_VECTOR
    out_stride = stride_of(weight_out_units, WEIGHT_OUT)
    in_stride = stride_of(weight_in_units, WEIGHT_IN)
    first_out = (program % out_blocks) * OUT
    group = program // out_blocks
    first_of_group = group.to(tl.int64) * tiles_per_group * ROWS
    count = tl.minimum(rows - first_of_group, tiles_per_group * ROWS).to(tl.int32)

    source = Gated(x_ptr, affine_ptr, gate_ptr)
    bias = tl.zeros([OUT], DTYPE)
    if bias_ptr is not None:
        bias += load_channels(bias_ptr, first_out, out_channels, OUT)
    if WHOLE:
        weight = load_weight(
            weight_ptr, out_stride, in_stride, WeightBlock(first_out, out_channels, 0, in_channels), OUT, IN
        )
    shift = tl.zeros([OUT], DTYPE)
    if statistics_ptr is not None:
        total = tl.zeros([OUT], DTYPE)
        square = tl.zeros([OUT], DTYPE)

    for row in range(0, count, ROWS):
        first_row = first_of_group + row
        y = tl.zeros([ROWS, OUT], DTYPE)
        if WHOLE:
            z = load_gated(source, Tile(first_row, rows, 0, in_channels), positions, ACTIVATION, ROWS, IN, DTYPE)
            y = product(z, tl.trans(weight), y, ROUNDED, FACTOR, PRECISION)
        else:
            for first_in in range(0, in_channels, IN):
                z = load_gated(
                    source, Tile(first_row, rows, first_in, in_channels), positions, ACTIVATION, ROWS, IN, DTYPE
                )
                weight = load_weight(
                    weight_ptr,
                    out_stride,
                    in_stride,
                    WeightBlock(first_out, out_channels, first_in, in_channels),
                    OUT,
                    IN,
                )
                y = product(z, tl.trans(weight), y, ROUNDED, FACTOR, PRECISION)

        of_y = Tile(first_row, rows, first_out, out_channels)
        y = activate(y + bias[None, :], OUTPUT_ACTIVATION)
        if residual_ptr is not None:
            y += load_tile(residual_ptr, of_y, ROWS, OUT).to(DTYPE)
        stored = y.to(y_ptr.dtype.element_ty)
        store_tile(y_ptr, of_y, stored, ROWS, OUT)

        if statistics_ptr is not None:
            y = clear_outside(stored.to(DTYPE), of_y, ROWS, OUT)
            if row == 0:  # see `sum_deviations`
                shift = tl.sum(y, 0) / tl.minimum(count, ROWS).to(DTYPE)
            deviation = clear_outside(y - shift[None, :], of_y, ROWS, OUT)
            total += tl.sum(deviation, 0)
            square += tl.sum(deviation * deviation, 0)

    if statistics_ptr is not None:
        at = columns_from(first_out, out_channels, OUT)
        store_moments(partials_ptr, group, groups, at, count.to(DTYPE), shift, total, square)
        if is_last(tickets_ptr + program % out_blocks, groups):
            mean, m2, values = merge_moments(partials_ptr, groups, at, GROUPS, OUT, DTYPE)
            finish_statistics(
                statistics_ptr,
                Norm(norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr),
                at,
                mean,
                m2 / values,
                values,
                tl.full([], momentum, DTYPE),
                tl.full([], eps, DTYPE),
            )
            if num_batches_tracked_ptr is not None:  # noqa: SIM102  # for the compiler, a condition of its own
                if first_out == 0:
                    count_batch(num_batches_tracked_ptr)
