"""Triton kernels of batch normalization: two that sum over rows, two that go element by element, one on channels alone."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.triton_finish import (
    Back,
    Norm,
    count_batch,
    finish_statistics,
    finish_sums,
    is_last,
    merge_moments,
)
from biasloss_ext.ops.triton_map_kernels import (
    activate,
    derivative,
    gradient_behind_norm,
    load_channels,
    normalize,
    store_moments,
    sum_deviations,
    tile_of,
)


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
    program = tl.program_id(0)
    channels = units * VECTOR
    block = program % blocks
    first_channel = block * CHANNELS
    group = program // blocks
    first_row = group.to(tl.int64) * group_rows
    count = tl.minimum(rows - first_row, group_rows).to(tl.int32)
    shift, total, squares = sum_deviations(
        y_ptr, None, first_row, count, first_channel, channels, 0, ROWS, CHANNELS, DTYPE
    )
    column = first_channel + tl.arange(0, CHANNELS)
    exists = column < channels
    store_moments(partials_ptr, group, groups, column, channels, count.to(DTYPE), shift, total, squares)
    if is_last(tickets_ptr + block, groups):
        mean, m2, values = merge_moments(partials_ptr, groups, channels, column, exists, GROUPS, CHANNELS, DTYPE)
        finish_statistics(
            statistics_ptr,
            Norm(norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr),
            column,
            channels,
            exists,
            mean,
            m2 / values,
            values,
            momentum,
            eps,
        )
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
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = column < channels
    mean = tl.load(moments_ptr + column, mask=exists, other=0.0)
    variance = tl.load(moments_ptr + channels + column, mask=exists, other=0.0)
    finish_statistics(
        statistics_ptr,
        Norm(norm_weight_ptr, norm_bias_ptr, running_mean_ptr, running_var_ptr),
        column,
        channels,
        exists,
        mean,
        variance,
        count.to(DTYPE),
        momentum,
        eps,
    )
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
    program = tl.program_id(0)
    channels = units * VECTOR
    first_channel = (program % blocks) * CHANNELS
    first_row = (program // blocks).to(tl.int64) * ROWS
    offsets, inside = tile_of(first_row, rows, first_channel, channels, ROWS, CHANNELS)
    start = first_row * channels
    y = tl.load(y_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
    h = activate(normalize(y, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
    tl.store(h_ptr + start + offsets, h.to(h_ptr.dtype.element_ty), mask=inside)


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
    program = tl.program_id(0)
    channels = units * VECTOR
    block = program % blocks
    first_channel = block * CHANNELS
    group = program // blocks
    first_row = group.to(tl.int64) * group_rows
    center = load_channels(moments_ptr, first_channel, channels, CHANNELS)
    totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    centered_totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    for row in range(0, group_rows, ROWS):
        offsets, inside = tile_of(first_row + row, rows, first_channel, channels, ROWS, CHANNELS)
        start = (first_row + row) * channels
        grad = tl.load(grad_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        y = tl.load(y_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        du = grad * derivative(normalize(y, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
        du = tl.where(inside, du, 0.0)
        totals += du
        centered_totals += du * (y - center[None, :])
    column = first_channel + tl.arange(0, CHANNELS)
    finish_sums(
        (tl.sum(totals, 0), tl.sum(centered_totals, 0)),
        Back(coefficients_ptr, affine_ptr, moments_ptr, eps),
        partials_ptr,
        tickets_ptr + block,
        group,
        groups,
        column,
        channels,
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
    program = tl.program_id(0)
    channels = units * VECTOR
    first_channel = (program % blocks) * CHANNELS
    first_row = (program // blocks).to(tl.int64) * ROWS
    offsets, inside = tile_of(first_row, rows, first_channel, channels, ROWS, CHANNELS)
    start = first_row * channels
    grad = tl.load(grad_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
    y = tl.load(y_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
    du = grad * derivative(normalize(y, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
    dy = gradient_behind_norm(du, y, coefficients_ptr, first_channel, channels, CHANNELS)
    tl.store(dy_ptr + start + offsets, dy.to(dy_ptr.dtype.element_ty), mask=inside)
