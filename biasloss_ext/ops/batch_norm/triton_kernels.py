"""Triton kernels of batch normalization: two that sum over rows, two that go element by element, one on channels alone."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.triton_finish import (
    Back,
    Norm,
    columns_from,
    count_batch,
    finish_statistics,
    finish_sums,
    is_last,
    merge_moments,
)
from biasloss_ext.ops.triton_map_kernels import (
    Tile,
    below,
    clear_outside,
    derivative,
    gradient_behind_norm,
    load_activated,
    load_channels,
    load_tile,
    normalize,
    store_moments,
    store_tile,
    sum_deviations,
)


@triton.jit
def tile_of_program(rows, group_rows, units, blocks, VECTOR: tl.constexpr, CHANNELS: tl.constexpr):
    """(block of channels, group of ``group_rows`` rows, `Tile`) of this program."""
    program = tl.program_id(0)
    channels = units * VECTOR
    block = program % blocks
    first_channel = block * CHANNELS
    group = program // blocks
    return block, group, Tile(group.to(tl.int64) * group_rows, rows, first_channel, channels)


@triton.jit(do_not_specialize=["rows", "units", "blocks", "groups", "group_rows"])
def statistics_kernel(
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
    units,
    blocks,
    groups,
    group_rows,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The moments of one block of channels over one group of rows; the last program of a block finishes its statistics."""
    block, group, tile = tile_of_program(rows, group_rows, units, blocks, VECTOR, CHANNELS)
    count = tl.minimum(rows - tile.first_row, group_rows).to(tl.int32)
    tile = Tile(tile.first_row, tile.first_row + count, tile.first_channel, tile.channels)
    shift, total, squares = sum_deviations(y_ptr, None, tile, count, 0, ROWS, CHANNELS, DTYPE)
    at = columns_from(tile.first_channel, tile.channels, CHANNELS)
    store_moments(partials_ptr, group, groups, at, count.to(DTYPE), shift, total, squares)
    if is_last(tickets_ptr + block, groups):
        mean, m2, values = merge_moments(partials_ptr, groups, at, GROUPS, CHANNELS, DTYPE)
        norm = Norm(norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr)
        finish_statistics(statistics_ptr, norm, at, mean, m2 / values, values, momentum, eps)
        if num_batches_tracked_ptr is not None and block == 0:
            count_batch(num_batches_tracked_ptr)


@triton.jit(do_not_specialize=["channels", "count"])
def affine_kernel(
    moments_ptr,
    statistics_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    momentum: tl.float64,
    eps: tl.float64,
    channels,
    count,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The statistics that follow from given moments."""
    at = columns_from(tl.program_id(0) * CHANNELS, channels, CHANNELS)
    mean = tl.load(moments_ptr + at.column, mask=at.exists, other=0.0)
    variance = tl.load(moments_ptr + channels + at.column, mask=at.exists, other=0.0)
    norm = Norm(norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr)
    finish_statistics(statistics_ptr, norm, at, mean, variance, count.to(DTYPE), momentum, eps)
    if num_batches_tracked_ptr is not None and tl.program_id(0) == 0:
        count_batch(num_batches_tracked_ptr)


@triton.jit(do_not_specialize=["rows", "units", "blocks"])
def apply_kernel(
    y_ptr,
    affine_ptr,
    residual_ptr,
    h_ptr,
    rows,
    units,
    blocks,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    _, _, tile = tile_of_program(rows, ROWS, units, blocks, VECTOR, CHANNELS)
    h = load_activated(y_ptr, affine_ptr, tile, ACTIVATION, ROWS, CHANNELS, DTYPE)
    if residual_ptr is not None:
        h += load_tile(residual_ptr, tile, ROWS, CHANNELS).to(DTYPE)
    store_tile(h_ptr, tile, h, ROWS, CHANNELS)


@triton.jit(do_not_specialize=["rows", "units", "blocks", "groups", "group_rows"])
def coefficients_kernel(
    grad_ptr,
    y_ptr,
    affine_ptr,
    moments_ptr,
    coefficients_ptr,
    partials_ptr,
    tickets_ptr,
    eps: tl.float64,
    rows,
    units,
    blocks,
    groups,
    group_rows,
    ACTIVATION: tl.constexpr,
    FROZEN: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """sum(du) and sum(du * (y - mean)) of one block of channels over one group of rows; the last program of a block finishes
    its coefficients."""
    block, group, tile = tile_of_program(rows, group_rows, units, blocks, VECTOR, CHANNELS)
    center = load_channels(moments_ptr, tile.first_channel, tile.channels, CHANNELS)
    totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    centered_totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    for row in range(0, group_rows, ROWS):
        here = below(tile, row)
        grad = load_tile(grad_ptr, here, ROWS, CHANNELS).to(DTYPE)
        y = load_tile(y_ptr, here, ROWS, CHANNELS).to(DTYPE)
        du = grad * derivative(normalize(y, affine_ptr, here, CHANNELS), ACTIVATION)
        du = clear_outside(du, here, ROWS, CHANNELS)
        totals += du
        centered_totals += du * (y - center[None, :])
    finish_sums(
        (tl.sum(totals, 0), tl.sum(centered_totals, 0)),
        Back(coefficients_ptr, affine_ptr, moments_ptr, eps),
        partials_ptr,
        tickets_ptr + block,
        group,
        groups,
        columns_from(tile.first_channel, tile.channels, CHANNELS),
        rows,
        FROZEN,
        GROUPS,
        CHANNELS,
        DTYPE,
    )


@triton.jit(do_not_specialize=["rows", "units", "blocks"])
def backward_kernel(
    grad_ptr,
    y_ptr,
    affine_ptr,
    coefficients_ptr,
    dy_ptr,
    rows,
    units,
    blocks,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    _, _, tile = tile_of_program(rows, ROWS, units, blocks, VECTOR, CHANNELS)
    grad = load_tile(grad_ptr, tile, ROWS, CHANNELS).to(DTYPE)
    y = load_tile(y_ptr, tile, ROWS, CHANNELS).to(DTYPE)
    du = grad * derivative(normalize(y, affine_ptr, tile, CHANNELS), ACTIVATION)
    store_tile(dy_ptr, tile, gradient_behind_norm(du, y, coefficients_ptr, tile, CHANNELS), ROWS, CHANNELS)
