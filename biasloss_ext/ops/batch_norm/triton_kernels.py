"""Triton kernels of batch normalisation: two that sum over rows, two that go element by element."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.triton_map_kernels import (
    activate,
    derivative,
    gradient_behind_norm,
    load_channels,
    normalise,
    store_moments,
    sum_deviations,
    tile_of,
)


@triton.jit(do_not_specialize=["rows", "units", "blocks", "groups", "group_rows"])
def moments_kernel(
    y_ptr,
    partials_ptr,
    rows,
    units,
    blocks,
    groups,
    group_rows,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The moments of one block of channels over one group of rows."""
    program = tl.program_id(0)
    channels = units * VECTOR
    first_channel = (program % blocks) * CHANNELS
    group = program // blocks
    first_row = group.to(tl.int64) * group_rows
    count = tl.minimum(rows - first_row, group_rows).to(tl.int32)
    shift, total, squares = sum_deviations(
        y_ptr, None, first_row, count, first_channel, channels, 0, ROWS, CHANNELS, DTYPE
    )
    column = first_channel + tl.arange(0, CHANNELS)
    store_moments(partials_ptr, group, groups, column, channels, count.to(DTYPE), shift, total, squares)


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
    h = activate(normalise(y, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
    tl.store(h_ptr + start + offsets, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "units", "blocks", "groups", "group_rows"])
def sums_kernel(
    grad_ptr,
    y_ptr,
    affine_ptr,
    center_ptr,
    partials_ptr,
    rows,
    units,
    blocks,
    groups,
    group_rows,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """sum(du) and sum(du * (y - center)) of one block of channels over one group of rows."""
    program = tl.program_id(0)
    channels = units * VECTOR
    first_channel = (program % blocks) * CHANNELS
    group = program // blocks
    first_row = group.to(tl.int64) * group_rows
    center = load_channels(center_ptr, first_channel, channels, CHANNELS)
    totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    away_totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    for row in range(0, group_rows, ROWS):
        offsets, inside = tile_of(first_row + row, rows, first_channel, channels, ROWS, CHANNELS)
        start = (first_row + row) * channels
        grad = tl.load(grad_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        y = tl.load(y_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        du = grad * derivative(normalise(y, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
        du = tl.where(inside, du, 0.0)
        totals += du
        away_totals += du * (y - center[None, :])
    column = first_channel + tl.arange(0, CHANNELS)
    pointers = partials_ptr + group.to(tl.int64) * channels + column
    tl.store(pointers, tl.sum(totals, 0), mask=column < channels)
    tl.store(pointers + groups.to(tl.int64) * channels, tl.sum(away_totals, 0), mask=column < channels)


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
    du = grad * derivative(normalise(y, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
    dy = gradient_behind_norm(du, y, coefficients_ptr, first_channel, channels, CHANNELS)
    tl.store(dy_ptr + start + offsets, dy.to(dy_ptr.dtype.element_ty), mask=inside)
