"""Triton kernels of the squeeze-and-excitation gate: small products of matrices, rows the samples of the batch."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.triton_finish import finish_coefficients, is_last
from biasloss_ext.ops.triton_map_kernels import activate, derivative, load_channels, product, tile_of


@triton.jit
def load_factor(
    values_ptr,
    slope_at_ptr,
    first_row,
    rows,
    first_channel,
    channels,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """act(values), or with ``slope_at`` the gradient before an activation: values * act'(slope_at). 0 outside. Other programs
    of the launch may have stored the values: they are not read through the first cache."""
    offsets, inside = tile_of(first_row, rows, first_channel, channels, ROWS, CHANNELS)
    start = first_row * channels
    values = tl.load(values_ptr + start + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    if slope_at_ptr is not None:
        values *= derivative(tl.load(slope_at_ptr + start + offsets, mask=inside, other=0.0), ACTIVATION)
    else:
        values = activate(values, ACTIVATION)
    return tl.where(inside, values, 0.0)


@triton.jit
def linear_tile(
    values_ptr,
    slope_at_ptr,
    weight_ptr,
    bias_ptr,
    first_row,
    samples,
    in_channels,
    first_out,
    out_channels,
    in_stride,
    out_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS x OUT of factor @ weight + bias; the weight's strides say how it lies in memory."""
    out_channel = first_out + tl.arange(0, OUT)
    result = tl.zeros([ROWS, OUT], DTYPE)
    for first_in in range(0, in_channels, IN):
        factor = load_factor(values_ptr, slope_at_ptr, first_row, samples, first_in, in_channels, ACTIVATION, ROWS, IN)
        in_channel = first_in + tl.arange(0, IN)
        inside = (in_channel < in_channels)[:, None] & (out_channel < out_channels)[None, :]
        pointers = weight_ptr + in_channel[:, None] * in_stride + out_channel[None, :] * out_stride
        weight = tl.load(pointers, mask=inside, other=0.0)
        result = product(factor, weight, result, DTYPE, DTYPE, PRECISION)
    if bias_ptr is not None:
        result += load_channels(bias_ptr, first_out, out_channels, OUT)[None, :]
    return result


@triton.jit
def store_tile(ptr, values, first_row, samples, first_out, out_channels, ROWS: tl.constexpr, OUT: tl.constexpr):
    offsets, inside = tile_of(first_row, samples, first_out, out_channels, ROWS, OUT)
    tl.store(ptr + first_row * out_channels + offsets, values, mask=inside)


@triton.jit(do_not_specialize=["samples", "channels", "hidden", "hidden_blocks"])
def gate_kernel(
    pooled_ptr,
    reduce_weight_ptr,
    reduce_bias_ptr,
    expand_weight_ptr,
    expand_bias_ptr,
    reduced_ptr,
    expanded_ptr,
    gate_ptr,
    tickets_ptr,
    samples,
    channels,
    hidden,
    hidden_blocks,
    ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of hidden units of some samples; the last program of those samples goes on to their gates."""
    program = tl.program_id(0)
    row_block = program // hidden_blocks
    first_row = row_block.to(tl.int64) * ROWS
    first_hidden = (program % hidden_blocks) * BLOCK
    reduced = linear_tile(
        pooled_ptr, None, reduce_weight_ptr, reduce_bias_ptr, first_row, samples, channels, first_hidden, hidden,
        1, channels, 0, ROWS, BLOCK, BLOCK, DTYPE, PRECISION,
    )  # fmt: skip
    store_tile(reduced_ptr, reduced, first_row, samples, first_hidden, hidden, ROWS, BLOCK)
    if is_last(tickets_ptr + row_block, hidden_blocks):
        for first_channel in range(0, channels, BLOCK):
            expanded = linear_tile(
                reduced_ptr, None, expand_weight_ptr, expand_bias_ptr, first_row, samples, hidden, first_channel,
                channels, 1, hidden, ACTIVATION, ROWS, BLOCK, BLOCK, DTYPE, PRECISION,
            )  # fmt: skip
            store_tile(expanded_ptr, expanded, first_row, samples, first_channel, channels, ROWS, BLOCK)
            gate = activate(expanded, GATE_ACTIVATION)
            store_tile(gate_ptr, gate, first_row, samples, first_channel, channels, ROWS, BLOCK)


@triton.jit(do_not_specialize=["samples", "channels", "hidden", "hidden_blocks"])
def pool_gradient_kernel(
    gate_grad_ptr,
    expanded_ptr,
    reduced_ptr,
    reduce_weight_ptr,
    expand_weight_ptr,
    hidden_grad_ptr,
    pool_grad_ptr,
    tickets_ptr,
    samples,
    channels,
    hidden,
    hidden_blocks,
    ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient at a block of activated hidden units of some samples; the last program of those samples goes on to the
    gradient at what was pooled."""
    program = tl.program_id(0)
    row_block = program // hidden_blocks
    first_row = row_block.to(tl.int64) * ROWS
    first_hidden = (program % hidden_blocks) * BLOCK
    hidden_grad = linear_tile(
        gate_grad_ptr, expanded_ptr, expand_weight_ptr, None, first_row, samples, channels, first_hidden, hidden,
        hidden, 1, GATE_ACTIVATION, ROWS, BLOCK, BLOCK, DTYPE, PRECISION,
    )  # fmt: skip
    store_tile(hidden_grad_ptr, hidden_grad, first_row, samples, first_hidden, hidden, ROWS, BLOCK)
    if is_last(tickets_ptr + row_block, hidden_blocks):
        for first_channel in range(0, channels, BLOCK):
            pool_grad = linear_tile(
                hidden_grad_ptr, reduced_ptr, reduce_weight_ptr, None, first_row, samples, hidden, first_channel,
                channels, channels, 1, ACTIVATION, ROWS, BLOCK, BLOCK, DTYPE, PRECISION,
            )  # fmt: skip
            store_tile(pool_grad_ptr, pool_grad, first_row, samples, first_channel, channels, ROWS, BLOCK)


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
        grad = load_factor(
            grad_ptr, slope_at_ptr, first_row, samples, first_out, out_channels, SLOPE_ACTIVATION, ROWS, BLOCK
        )
        values = load_factor(values_ptr, None, first_row, samples, first_in, in_channels, ACTIVATION, ROWS, BLOCK)
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
    column = first_channel + tl.arange(0, BLOCK)
    exists = column < channels
    quantity = samples.to(tl.int64) * channels
    positions_of_all = (positions + tl.zeros([BLOCK], tl.int32)).to(DTYPE)
    du = tl.zeros([ROWS, BLOCK], DTYPE)
    du_centered = tl.zeros([ROWS, BLOCK], DTYPE)
    first_row = tl.full([], 0, tl.int64)
    for _ in range(0, samples, ROWS):
        offsets, inside = tile_of(first_row, samples, first_channel, channels, ROWS, BLOCK)
        offsets += first_row * channels
        share = tl.load(pool_grad_ptr + offsets, mask=inside, other=0.0) / positions_of_all[None, :]
        pointers = sums_ptr + offsets
        du += tl.load(pointers, mask=inside, other=0.0)
        du += share * tl.load(pointers + quantity, mask=inside, other=0.0)
        du_centered += tl.load(pointers + quantity * 2, mask=inside, other=0.0)
        du_centered += share * tl.load(pointers + quantity * 3, mask=inside, other=0.0)
        first_row += ROWS
    count = samples.to(DTYPE) * positions.to(DTYPE)
    finish_coefficients(
        coefficients_ptr,
        affine_ptr,
        moments_ptr,
        column,
        channels,
        exists,
        tl.sum(du, 0),
        tl.sum(du_centered, 0),
        count,
        eps,
        FROZEN,
    )


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
            program, hidden_grad_ptr, reduced_ptr, pooled_ptr, reduce_weight_grad_ptr, reduce_bias_grad_ptr, samples,
            channels, hidden, ACTIVATION, 0, ROWS, BLOCK, DTYPE, PRECISION,
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
