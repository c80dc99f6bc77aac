"""Triton kernels of the 1x1 convolution's backward pass: gradient and sums at the input, gradient at the weight."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.pointwise.triton_kernels import load_gated, load_weight
from biasloss_ext.ops.triton_map_kernels import (
    activate,
    derivative,
    gradient_behind_norm,
    load_channels,
    normalise,
    product,
    tile_of,
)


@triton.jit
def load_dy(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    first_row,
    rows,
    first_channel,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of dy, 0 past the last row and the last channel."""
    offsets, inside = tile_of(first_row, rows, first_channel, channels, ROWS, CHANNELS)
    start = first_row * channels
    dy = tl.load(grad_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
    if coefficients_ptr is not None:
        y = tl.load(y_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        dy = gradient_behind_norm(dy, y, coefficients_ptr, first_channel, channels, CHANNELS)
        dy = tl.where(inside, dy, 0.0)
    return dy


@triton.jit(
    do_not_specialize=["segments", "segment_rows", "in_units", "out_units", "in_blocks", "chunks", "chunk_rows"]
)
def data_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    x_ptr,
    weight_ptr,
    affine_ptr,
    center_ptr,
    gate_ptr,
    residual_grad_ptr,
    grad_x_ptr,
    gate_grad_ptr,
    sums_ptr,
    segments,
    segment_rows,
    in_units,
    out_units,
    in_blocks,
    chunks,
    chunk_rows,
    ACTIVATION: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDED: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh, and what is summed over it, of a block of input channels over a chunk of one segment.

    A segment is a sample where something is summed by sample, else the whole batch. WHOLE: one block holds all output channels.
    ``gate_grad`` is (segments, chunks, in), ``sums`` (4, segments, chunks, in).
    """
    program = tl.program_id(0)
    in_channels = in_units * IN_VECTOR
    out_channels = out_units * OUT_VECTOR
    first_in = (program % in_blocks) * IN
    chunk = (program // in_blocks) % chunks
    segment = (program // in_blocks // chunks).to(tl.int64)
    first_of_chunk = segment * segment_rows + chunk.to(tl.int64) * chunk_rows
    count = tl.minimum(segment_rows - chunk.to(tl.int64) * chunk_rows, chunk_rows).to(tl.int32)
    end = first_of_chunk + count

    if WHOLE:
        weight = load_weight(weight_ptr, 0, out_channels, first_in, in_channels, OUT, IN)
    if gate_ptr is not None:
        gate = load_channels(gate_ptr + segment * in_channels, first_in, in_channels, IN)
        gate_total = tl.zeros([IN], DTYPE)
    if sums_ptr is not None:
        center = load_channels(center_ptr, first_in, in_channels, IN)
        dh_total = tl.zeros([IN], DTYPE)
        slope_total = tl.zeros([IN], DTYPE)
        dh_away_total = tl.zeros([IN], DTYPE)
        slope_away_total = tl.zeros([IN], DTYPE)

    for row in range(0, count, ROWS):
        first_row = first_of_chunk + row
        dz = tl.zeros([ROWS, IN], DTYPE)
        if WHOLE:
            dy = load_dy(grad_ptr, y_ptr, coefficients_ptr, first_row, end, 0, out_channels, ROWS, OUT, DTYPE)
            dz = product(dy, weight, dz, ROUNDED, FACTOR, PRECISION)
        else:
            for first_out in range(0, out_channels, OUT):
                dy = load_dy(
                    grad_ptr, y_ptr, coefficients_ptr, first_row, end, first_out, out_channels, ROWS, OUT, DTYPE
                )
                weight = load_weight(weight_ptr, first_out, out_channels, first_in, in_channels, OUT, IN)
                dz = product(dy, weight, dz, ROUNDED, FACTOR, PRECISION)

        offsets, inside = tile_of(first_row, end, first_in, in_channels, ROWS, IN)
        start = first_row * in_channels
        if gate_ptr is not None or sums_ptr is not None:
            x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
            u = normalise(x, affine_ptr, first_in, in_channels, IN)
        dh = dz
        if gate_ptr is not None:
            gate_total += tl.sum(tl.where(inside, dz * activate(u, ACTIVATION), 0.0), 0)
            dh = dz * gate[None, :]
        if residual_grad_ptr is not None:
            dh += tl.load(residual_grad_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + start + offsets, dh.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if sums_ptr is not None:
            away = x - center[None, :]
            slope = tl.where(inside, derivative(u, ACTIVATION), 0.0)
            du = tl.where(inside, dh * slope, 0.0)
            dh_total += tl.sum(du, 0)
            slope_total += tl.sum(slope, 0)
            dh_away_total += tl.sum(du * away, 0)
            slope_away_total += tl.sum(slope * away, 0)

    column = first_in + tl.arange(0, IN)
    exists = column < in_channels
    place = (segment * chunks + chunk) * in_channels + column
    if gate_ptr is not None:
        tl.store(gate_grad_ptr + place, gate_total, mask=exists)
    if sums_ptr is not None:
        quantity = segments.to(tl.int64) * chunks * in_channels
        tl.store(sums_ptr + place, dh_total, mask=exists)
        tl.store(sums_ptr + quantity + place, slope_total, mask=exists)
        tl.store(sums_ptr + quantity * 2 + place, dh_away_total, mask=exists)
        tl.store(sums_ptr + quantity * 3 + place, slope_away_total, mask=exists)


@triton.jit(do_not_specialize=["rows", "positions", "in_units", "out_units", "in_blocks", "out_blocks", "group_rows"])
def weight_kernel(
    grad_ptr,
    y_ptr,
    coefficients_ptr,
    x_ptr,
    affine_ptr,
    gate_ptr,
    partials_ptr,
    rows,
    positions,
    in_units,
    out_units,
    in_blocks,
    out_blocks,
    group_rows,
    ACTIVATION: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDED: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum dy z of a block of the weight over a group of rows; partials (groups, out, in)."""
    program = tl.program_id(0)
    in_channels = in_units * IN_VECTOR
    out_channels = out_units * OUT_VECTOR
    first_in = (program % in_blocks) * IN
    first_out = ((program // in_blocks) % out_blocks) * OUT
    group = (program // in_blocks // out_blocks).to(tl.int64)
    first_of_group = group * group_rows
    count = tl.minimum(rows - first_of_group, group_rows).to(tl.int32)
    total = tl.zeros([OUT, IN], DTYPE)
    for row in range(0, count, ROWS):
        first_row = first_of_group + row
        dy = load_dy(grad_ptr, y_ptr, coefficients_ptr, first_row, rows, first_out, out_channels, ROWS, OUT, DTYPE)
        z = load_gated(
            x_ptr,
            affine_ptr,
            gate_ptr,
            first_row,
            rows,
            positions,
            first_in,
            in_channels,
            ACTIVATION,
            ROWS,
            IN,
            DTYPE,
        )
        total = product(tl.trans(dy), z, total, ROUNDED, FACTOR, PRECISION)
    offsets, inside = tile_of(first_out.to(tl.int64), out_channels, first_in, in_channels, OUT, IN)
    start = group * out_channels * in_channels + first_out * in_channels
    tl.store(partials_ptr + start + offsets, total, mask=inside)
