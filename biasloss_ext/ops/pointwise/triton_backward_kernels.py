"""Triton kernels of the 1x1 convolution's backward pass: gradient and sums at the input, gradient at the weight.

One kernel does all where it can keep the gradient of the whole weight, since it then reads every map once; else a second
kernel computes the gradient of the weight, block by block. The last programs of each add up what the others leave.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.pointwise.triton_kernels import Gated, WeightBlock, load_gated, load_weight, stride_of
from biasloss_ext.ops.pointwise.triton_partial_sums import finish_sums_of_sample, finish_weight
from biasloss_ext.ops.triton_finish import Back, columns_from, finish_sums
from biasloss_ext.ops.triton_map_kernels import (
    Tile,
    activate,
    clear_outside,
    derivative,
    gradient_behind_norm,
    load_channels,
    load_tile,
    normalize,
    product,
    store_tile,
)


@triton.jit
def load_dy(
    grad_ptr,
    y_ptr,
    y_coefficients_ptr,
    tile,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of dy, 0 past the last row and the last channel."""
    dy = load_tile(grad_ptr, tile, ROWS, CHANNELS).to(DTYPE)
    if y_coefficients_ptr is not None:
        y = load_tile(y_ptr, tile, ROWS, CHANNELS).to(DTYPE)
        dy = gradient_behind_norm(dy, y, y_coefficients_ptr, tile, CHANNELS)
        dy = clear_outside(dy, tile, ROWS, CHANNELS)
    return dy


@triton.jit(
    do_not_specialize=[
        "segments",
        "segment_rows",
        "in_units",
        "out_units",
        "weight_out_units",
        "weight_in_units",
        "in_blocks",
        "chunks",
        "chunk_rows",
        "weight_tickets",
        "groups_of_set",
        "sets",
    ]
)
def data_kernel(
    grad_ptr,
    y_ptr,
    y_coefficients_ptr,
    x_ptr,
    weight_ptr,
    affine_ptr,
    moments_ptr,
    gate_ptr,
    residual_grad_ptr,
    grad_x_ptr,
    gate_grad_ptr,
    sums_ptr,
    coefficients_ptr,
    grad_weight_ptr,
    partials_ptr,
    weight_partials_ptr,
    weight_sets_ptr,
    tickets_ptr,
    eps: tl.float64,
    segments,
    segment_rows,
    in_units,
    out_units,
    weight_out_units,
    weight_in_units,
    in_blocks,
    chunks,
    chunk_rows,
    weight_tickets,
    groups_of_set,
    sets,
    ACTIVATION: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    WEIGHT_OUT: tl.constexpr,
    WEIGHT_IN: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNKED: tl.constexpr,
    ANY_ORIGIN: tl.constexpr,
    FROZEN: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDED: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh, and what is summed over it, of a block of input channels over a chunk of one segment.

    A segment is a sample where there is a gate, else the whole batch. WHOLE: one block holds all output channels. CHUNKED:
    a segment has several chunks. With a grad_weight the block holds all of both, and the gradient of the weight is taken
    from the same reads. The tickets are those of the sums, one for each block of each segment, then those of the weight.
    """
    program = tl.program_id(0)
    in_channels = in_units * IN_VECTOR
    out_channels = out_units * OUT_VECTOR
    out_stride = stride_of(weight_out_units, WEIGHT_OUT)
    in_stride = stride_of(weight_in_units, WEIGHT_IN)
    first_in = (program % in_blocks) * IN
    chunk = (program // in_blocks) % chunks
    segment = (program // in_blocks // chunks).to(tl.int64)
    first_of_chunk = segment * segment_rows + chunk.to(tl.int64) * chunk_rows
    count = tl.minimum(segment_rows - chunk.to(tl.int64) * chunk_rows, chunk_rows).to(tl.int32)
    end = first_of_chunk + count

    if WHOLE:
        weight = load_weight(
            weight_ptr, out_stride, in_stride, WeightBlock(0, out_channels, first_in, in_channels), OUT, IN
        )
    if grad_weight_ptr is not None:
        weight_total = tl.zeros([OUT, IN], DTYPE)
        if ANY_ORIGIN:
            origin = load_channels(x_ptr, first_in, in_channels, IN).to(DTYPE)
    gate_total = tl.zeros([IN], DTYPE)
    dh_total = tl.zeros([IN], DTYPE)
    slope_total = tl.zeros([IN], DTYPE)
    dh_away_total = tl.zeros([IN], DTYPE)
    slope_away_total = tl.zeros([IN], DTYPE)
    if gate_ptr is not None:
        gate = load_channels(gate_ptr + segment * in_channels, first_in, in_channels, IN)
    if moments_ptr is not None:
        center = load_channels(moments_ptr, first_in, in_channels, IN)

    for row in range(0, count, ROWS):
        first_row = first_of_chunk + row
        dz = tl.zeros([ROWS, IN], DTYPE)
        if WHOLE:
            dy = load_dy(grad_ptr, y_ptr, y_coefficients_ptr, Tile(first_row, end, 0, out_channels), ROWS, OUT, DTYPE)
            dz = product(dy, weight, dz, ROUNDED, FACTOR, PRECISION)
        else:
            for first_out in range(0, out_channels, OUT):
                dy = load_dy(
                    grad_ptr, y_ptr, y_coefficients_ptr, Tile(first_row, end, first_out, out_channels), ROWS, OUT, DTYPE
                )
                weight = load_weight(
                    weight_ptr,
                    out_stride,
                    in_stride,
                    WeightBlock(first_out, out_channels, first_in, in_channels),
                    OUT,
                    IN,
                )
                dz = product(dy, weight, dz, ROUNDED, FACTOR, PRECISION)

        of_x = Tile(first_row, end, first_in, in_channels)
        if gate_ptr is not None or moments_ptr is not None or grad_weight_ptr is not None:
            x = load_tile(x_ptr, of_x, ROWS, IN).to(DTYPE)
            u = normalize(x, affine_ptr, of_x, IN)
        if grad_weight_ptr is not None:
            z = activate(u, ACTIVATION)
            if gate_ptr is not None:
                z *= gate[None, :]
            if ANY_ORIGIN:
                z -= origin[None, :]
            weight_total = product(tl.trans(dy), z, weight_total, ROUNDED, FACTOR, PRECISION)
        dh = dz
        if gate_ptr is not None:
            gate_total += tl.sum(dz * activate(u, ACTIVATION), 0)  # dz is 0 past the last row
            dh = dz * gate[None, :]
        if residual_grad_ptr is not None:
            dh += load_tile(residual_grad_ptr, of_x, ROWS, IN).to(DTYPE)
        if grad_x_ptr is not None:
            store_tile(grad_x_ptr, of_x, dh, ROWS, IN)
        if moments_ptr is not None:
            away = x - center[None, :]
            slope = derivative(u, ACTIVATION)
            du = dh * slope
            dh_total += tl.sum(du, 0)
            dh_away_total += tl.sum(du * away, 0)
            if gate_ptr is not None:
                slope = clear_outside(slope, of_x, ROWS, IN)
                slope_total += tl.sum(slope, 0)
                slope_away_total += tl.sum(slope * away, 0)

    if gate_ptr is not None:
        finish_sums_of_sample(
            gate_total,
            (dh_total, slope_total, dh_away_total, slope_away_total),
            gate_grad_ptr,
            sums_ptr,
            partials_ptr,
            tickets_ptr,
            segment,
            segments,
            chunk,
            chunks,
            in_blocks,
            first_in,
            in_channels,
            GROUPS,
            IN,
            CHUNKED,
            DTYPE,
        )
    elif moments_ptr is not None:
        finish_sums(
            (dh_total, dh_away_total),
            Back(coefficients_ptr, affine_ptr, moments_ptr, tl.full([], eps, DTYPE)),
            partials_ptr,
            tickets_ptr + program % in_blocks,
            chunk,
            chunks,
            columns_from(first_in, in_channels, IN),
            segment_rows,
            FROZEN,
            GROUPS,
            IN,
            DTYPE,
        )
    if grad_weight_ptr is not None:
        finish_weight(
            weight_total,
            grad_weight_ptr,
            weight_partials_ptr,
            weight_sets_ptr,
            tickets_ptr,
            weight_tickets,
            segment * chunks + chunk,
            segments * chunks,
            groups_of_set,
            sets,
            WeightBlock(first_in * 0, out_channels, first_in, in_channels),
            OUT,
            IN,
            weight_partials_ptr is not None,
        )


@triton.jit(
    do_not_specialize=[
        "rows",
        "positions",
        "in_units",
        "out_units",
        "in_blocks",
        "out_blocks",
        "groups",
        "group_rows",
        "groups_of_set",
        "sets",
    ]
)
def weight_kernel(
    grad_ptr,
    y_ptr,
    y_coefficients_ptr,
    x_ptr,
    affine_ptr,
    gate_ptr,
    grad_weight_ptr,
    partials_ptr,
    sets_ptr,
    tickets_ptr,
    rows,
    positions,
    in_units,
    out_units,
    in_blocks,
    out_blocks,
    groups,
    group_rows,
    groups_of_set,
    sets,
    ACTIVATION: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ANY_ORIGIN: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDED: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum dy z of a block of the weight over a group of rows. ANY_ORIGIN: z minus its first row."""
    program = tl.program_id(0)
    in_channels = in_units * IN_VECTOR
    out_channels = out_units * OUT_VECTOR
    first_in = (program % in_blocks) * IN
    first_out = ((program // in_blocks) % out_blocks) * OUT
    group = (program // in_blocks // out_blocks).to(tl.int64)
    first_of_group = group * group_rows
    count = tl.minimum(rows - first_of_group, group_rows).to(tl.int32)
    if ANY_ORIGIN:
        origin = load_channels(x_ptr, first_in, in_channels, IN).to(DTYPE)
    source = Gated(x_ptr, affine_ptr, gate_ptr)
    total = tl.zeros([OUT, IN], DTYPE)
    for row in range(0, count, ROWS):
        first_row = first_of_group + row
        of_dy, of_z = Tile(first_row, rows, first_out, out_channels), Tile(first_row, rows, first_in, in_channels)
        dy = load_dy(grad_ptr, y_ptr, y_coefficients_ptr, of_dy, ROWS, OUT, DTYPE)
        z = load_gated(source, of_z, positions, ACTIVATION, ROWS, IN, DTYPE)
        if ANY_ORIGIN:
            z -= origin[None, :]
        total = product(tl.trans(dy), z, total, ROUNDED, FACTOR, PRECISION)
    finish_weight(
        total,
        grad_weight_ptr,
        partials_ptr,
        sets_ptr,
        tickets_ptr,
        (program % (in_blocks * out_blocks)) * (sets + 1),
        group,
        groups,
        groups_of_set,
        sets,
        WeightBlock(first_out, out_channels, first_in, in_channels),
        OUT,
        IN,
        partials_ptr is not None,
    )
