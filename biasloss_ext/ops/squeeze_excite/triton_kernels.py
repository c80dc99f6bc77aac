"""Triton kernels of the squeeze-and-excitation gate: small products of matrices, rows the samples of the batch."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.triton_finish import Back, columns_from, finish_coefficients, is_last
from biasloss_ext.ops.triton_map_kernels import (
    Tile,
    activate,
    clear_outside,
    derivative,
    load_channels,
    load_tile,
    offsets_of,
    product,
    store_tile,
)


@triton.jit
def load_factor(
    values_ptr,
    slope_at_ptr,
    tile,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """act(values), or with ``slope_at`` the gradient before an activation: values * act'(slope_at). 0 outside."""
    values = load_tile(values_ptr, tile, ROWS, CHANNELS)
    if slope_at_ptr is not None:
        values *= derivative(load_tile(slope_at_ptr, tile, ROWS, CHANNELS), ACTIVATION)
    else:
        values = activate(values, ACTIVATION)
    return clear_outside(values, tile, ROWS, CHANNELS)


@triton.jit
def load_weight(
    weight_ptr, first_row, rows, first_column, columns, BY_ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """R x C of a matrix (rows, columns) that lies in memory row by row or column by column; 0 outside."""
    row = first_row + tl.arange(0, R)
    column = first_column + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if BY_ROWS:
        pointers = weight_ptr + row[:, None] * columns + column[None, :]
    else:
        pointers = weight_ptr + row[:, None] + column[None, :] * rows
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def finish_tile(
    result,
    bias_ptr,
    result_ptr,
    activated_ptr,
    tile,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Store a tile of the second layer's results and, where wanted, their activation."""
    if bias_ptr is not None:
        result += load_channels(bias_ptr, tile.first_channel, tile.channels, CHANNELS)[None, :]
    store_tile(result_ptr, tile, result, ROWS, CHANNELS)
    if activated_ptr is not None:
        store_tile(activated_ptr, tile, activate(result, ACTIVATION), ROWS, CHANNELS)


@triton.jit
def sum_tiles(partials_ptr, offsets, inside, stride, count, AT_ONCE: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of ``count`` tiles that lie ``stride`` apart, AT_ONCE loaded at a time. For the last program (`is_last`)."""
    total = tl.zeros(offsets.shape, DTYPE)
    for first in range(0, count, AT_ONCE):
        index = first + tl.arange(0, AT_ONCE)
        pointers = partials_ptr + index.to(tl.int64)[:, None, None] * stride + offsets[None, :, :]
        exists = (index < count)[:, None, None] & inside[None, :, :]
        total += tl.sum(tl.load(pointers, mask=exists, other=0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit(do_not_specialize=["samples", "channel_units", "hidden_units", "hidden_blocks"])
def layers_kernel(
    values_ptr,
    slope_at_ptr,
    first_weight_ptr,
    first_bias_ptr,
    hidden_slope_at_ptr,
    hidden_ptr,
    second_weight_ptr,
    second_bias_ptr,
    result_ptr,
    activated_ptr,
    partials_ptr,
    tickets_ptr,
    samples,
    channel_units,
    hidden_units,
    hidden_blocks,
    ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHANNEL_VECTOR: tl.constexpr,
    HIDDEN_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of hidden units of some samples, and their part of the second layer; channels to hidden units to channels.

    Forward: the gate. BACKWARD: from the gate's gradient the gradient at what was pooled, through the same weights. Every
    program reads its own rows and columns of the two weights alone. Where there are several blocks of hidden units, the last
    program of the samples adds up the parts.
    """
    SLOPE_ACTIVATION: tl.constexpr = GATE_ACTIVATION if BACKWARD else 0
    program = tl.program_id(0)
    channels = channel_units * CHANNEL_VECTOR
    hidden_channels = hidden_units * HIDDEN_VECTOR
    block = program % hidden_blocks
    row_block = program // hidden_blocks
    first_row = row_block.to(tl.int64) * ROWS
    first_hidden = block * HIDDEN
    hidden = tl.zeros([ROWS, HIDDEN], DTYPE)
    for first_channel in range(0, channels, CHANNELS):
        tile = Tile(first_row, samples, first_channel, channels)
        factor = load_factor(values_ptr, slope_at_ptr, tile, SLOPE_ACTIVATION, ROWS, CHANNELS)
        weight = load_weight(
            first_weight_ptr, first_channel, channels, first_hidden, hidden_channels, BACKWARD, CHANNELS, HIDDEN
        )
        hidden = product(factor, weight, hidden, DTYPE, DTYPE, PRECISION)
    if first_bias_ptr is not None:
        hidden += load_channels(first_bias_ptr, first_hidden, hidden_channels, HIDDEN)[None, :]
    of_hidden = Tile(first_row, samples, first_hidden, hidden_channels)
    if BACKWARD:
        hidden *= derivative(load_tile(hidden_slope_at_ptr, of_hidden, ROWS, HIDDEN), ACTIVATION)
    store_tile(hidden_ptr, of_hidden, hidden, ROWS, HIDDEN)
    if not BACKWARD:
        hidden = activate(hidden, ACTIVATION)
    hidden = clear_outside(hidden, of_hidden, ROWS, HIDDEN)

    size = samples.to(tl.int64) * channels
    for first_channel in range(0, channels, CHANNELS):
        weight = load_weight(
            second_weight_ptr, first_hidden, hidden_channels, first_channel, channels, BACKWARD, HIDDEN, CHANNELS
        )
        tile = Tile(first_row, samples, first_channel, channels)
        part = product(hidden, weight, tl.zeros([ROWS, CHANNELS], DTYPE), DTYPE, DTYPE, PRECISION)
        if partials_ptr is not None:
            store_tile(partials_ptr + block * size, tile, part, ROWS, CHANNELS)
        else:
            finish_tile(part, second_bias_ptr, result_ptr, activated_ptr, tile, GATE_ACTIVATION, ROWS, CHANNELS)
    if partials_ptr is not None:  # noqa: SIM102 (a constant of the compiler, then a value of the device)
        if is_last(tickets_ptr + row_block, hidden_blocks):
            for first_channel in range(0, channels, CHANNELS):
                tile = Tile(first_row, samples, first_channel, channels)
                offsets, inside = offsets_of(tile, ROWS, CHANNELS)
                parts_ptr = partials_ptr + first_row * channels
                total = sum_tiles(parts_ptr, offsets, inside, size, hidden_blocks, AT_ONCE, DTYPE)
                finish_tile(total, second_bias_ptr, result_ptr, activated_ptr, tile, GATE_ACTIVATION, ROWS, CHANNELS)


@triton.jit
def weight_block(
    block,
    grad_ptr,
    slope_at_ptr,
    values_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    samples,
    in_channels,
    out_channels,
    SLOPE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a block of a weight (out, in), summed over the samples in order, and of its part of the bias."""
    in_blocks = (in_channels + BLOCK - 1) // BLOCK
    first_in = (block % in_blocks) * BLOCK
    first_out = (block // in_blocks) * BLOCK
    total = tl.zeros([BLOCK, BLOCK], DTYPE)
    bias_total = tl.zeros([BLOCK], DTYPE)
    first_row = tl.full([], 0, tl.int64)
    for _ in range(0, samples, ROWS):
        of_grad = Tile(first_row, samples, first_out, out_channels)
        grad = load_factor(grad_ptr, slope_at_ptr, of_grad, SLOPE_ACTIVATION, ROWS, BLOCK)
        of_values = Tile(first_row, samples, first_in, in_channels)
        values = load_factor(values_ptr, None, of_values, ACTIVATION, ROWS, BLOCK)
        total = product(tl.trans(grad), values, total, DTYPE, DTYPE, PRECISION)
        bias_total += tl.sum(grad, 0)
        first_row += ROWS
    out_channel = first_out + tl.arange(0, BLOCK)
    in_channel = first_in + tl.arange(0, BLOCK)
    inside = (out_channel < out_channels)[:, None] & (in_channel < in_channels)[None, :]
    tl.store(weight_grad_ptr + out_channel[:, None] * in_channels + in_channel[None, :], total, mask=inside)
    if first_in == 0:
        tl.store(bias_grad_ptr + out_channel, bias_total, mask=out_channel < out_channels)


@triton.jit
def coefficients_block(
    first_channel,
    sums_ptr,
    pool_grad_ptr,
    affine_ptr,
    moments_ptr,
    coefficients_ptr,
    samples,
    channels,
    positions,
    eps,
    FROZEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The coefficients of a block of channels: the sums of every sample, completed by the gradient of its pool."""
    at = columns_from(first_channel, channels, BLOCK)
    quantity = samples.to(tl.int64) * channels
    positions_of_all = (positions + tl.zeros([BLOCK], tl.int32)).to(DTYPE)
    du = tl.zeros([ROWS, BLOCK], DTYPE)
    du_centered = tl.zeros([ROWS, BLOCK], DTYPE)
    first_row = tl.full([], 0, tl.int64)
    for _ in range(0, samples, ROWS):
        offsets, inside = offsets_of(Tile(first_row, samples, first_channel, channels), ROWS, BLOCK)
        offsets += first_row * channels
        share = tl.load(pool_grad_ptr + offsets, mask=inside, other=0.0) / positions_of_all[None, :]
        pointers = sums_ptr + offsets
        du += tl.load(pointers, mask=inside, other=0.0)
        du += share * tl.load(pointers + quantity, mask=inside, other=0.0)
        du_centered += tl.load(pointers + quantity * 2, mask=inside, other=0.0)
        du_centered += share * tl.load(pointers + quantity * 3, mask=inside, other=0.0)
        first_row += ROWS
    count = samples.to(DTYPE) * positions.to(DTYPE)
    back = Back(coefficients_ptr, affine_ptr, moments_ptr, eps)
    finish_coefficients(back, at, tl.sum(du, 0), tl.sum(du_centered, 0), count, FROZEN)


@triton.jit(do_not_specialize=["samples", "channels", "hidden", "positions", "weight_blocks"])
def parameters_kernel(
    gate_grad_ptr,
    pooled_ptr,
    reduced_ptr,
    expanded_ptr,
    hidden_grad_ptr,
    reduce_weight_grad_ptr,
    reduce_bias_grad_ptr,
    expand_weight_grad_ptr,
    expand_bias_grad_ptr,
    sums_ptr,
    pool_grad_ptr,
    affine_ptr,
    moments_ptr,
    coefficients_ptr,
    eps: tl.float64,
    samples,
    channels,
    hidden,
    positions,
    weight_blocks,
    ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    FROZEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Blocks of the reduction's weight, then of the expansion's, ``weight_blocks`` each, then of the coefficients."""
    program = tl.program_id(0)
    if program < weight_blocks:
        weight_block(
            program, hidden_grad_ptr, None, pooled_ptr, reduce_weight_grad_ptr, reduce_bias_grad_ptr, samples,
            channels, hidden, 0, 0, ROWS, BLOCK, DTYPE, PRECISION,
        )  # fmt: skip
    elif program < 2 * weight_blocks:
        weight_block(
            program - weight_blocks, gate_grad_ptr, expanded_ptr, reduced_ptr, expand_weight_grad_ptr,
            expand_bias_grad_ptr, samples, hidden, channels, GATE_ACTIVATION, ACTIVATION, ROWS, BLOCK, DTYPE, PRECISION,
        )  # fmt: skip
    elif sums_ptr is not None:
        coefficients_block(
            (program - 2 * weight_blocks) * BLOCK, sums_ptr, pool_grad_ptr, affine_ptr, moments_ptr, coefficients_ptr,
            samples, channels, positions, eps, FROZEN, ROWS, BLOCK, DTYPE,
        )  # fmt: skip
