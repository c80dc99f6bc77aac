"""Triton kernels of the squeeze-and-excitation gate: small products of matrices, rows the samples of the batch."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

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
    """act(values), or with ``slope_at`` what is behind an activation: values * act'(slope_at). 0 outside."""
    offsets, inside = tile_of(first_row, rows, first_channel, channels, ROWS, CHANNELS)
    start = first_row * channels
    values = tl.load(values_ptr + start + offsets, mask=inside, other=0.0)
    if slope_at_ptr is not None:
        values *= derivative(tl.load(slope_at_ptr + start + offsets, mask=inside, other=0.0), ACTIVATION)
    else:
        values = activate(values, ACTIVATION)
    return tl.where(inside, values, 0.0)


@triton.jit(do_not_specialize=["samples", "in_channels", "out_channels", "out_blocks", "in_stride", "out_stride"])
def linear_kernel(
    values_ptr,
    slope_at_ptr,
    weight_ptr,
    bias_ptr,
    result_ptr,
    activated_ptr,
    samples,
    in_channels,
    out_channels,
    out_blocks,
    in_stride,
    out_stride,
    ACTIVATION: tl.constexpr,
    OUTPUT_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """result = factor @ weight + bias, and where wanted its activation; the weight's strides say how it lies in memory."""
    program = tl.program_id(0)
    first_out = (program % out_blocks) * OUT
    first_row = (program // out_blocks).to(tl.int64) * ROWS
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
    offsets, inside = tile_of(first_row, samples, first_out, out_channels, ROWS, OUT)
    start = first_row * out_channels
    tl.store(result_ptr + start + offsets, result, mask=inside)
    if activated_ptr is not None:
        tl.store(activated_ptr + start + offsets, activate(result, OUTPUT_ACTIVATION), mask=inside)


@triton.jit(do_not_specialize=["samples", "in_channels", "out_channels", "in_blocks"])
def weight_kernel(
    grad_ptr,
    slope_at_ptr,
    values_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    samples,
    in_channels,
    out_channels,
    in_blocks,
    GATE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a block of a weight (out, in), summed over the samples in order, and of its part of the bias."""
    program = tl.program_id(0)
    first_in = (program % in_blocks) * IN
    first_out = (program // in_blocks) * OUT
    total = tl.zeros([OUT, IN], DTYPE)
    bias_total = tl.zeros([OUT], DTYPE)
    first_row = tl.full([], 0, tl.int64)
    for _ in range(0, samples, ROWS):
        grad = load_factor(
            grad_ptr, slope_at_ptr, first_row, samples, first_out, out_channels, GATE_ACTIVATION, ROWS, OUT
        )
        values = load_factor(values_ptr, None, first_row, samples, first_in, in_channels, ACTIVATION, ROWS, IN)
        total = product(tl.trans(grad), values, total, DTYPE, DTYPE, PRECISION)
        bias_total += tl.sum(grad, 0)
        first_row += ROWS
    out_channel = first_out + tl.arange(0, OUT)
    in_channel = first_in + tl.arange(0, IN)
    inside = (out_channel < out_channels)[:, None] & (in_channel < in_channels)[None, :]
    tl.store(weight_grad_ptr + out_channel[:, None] * in_channels + in_channel[None, :], total, mask=inside)
    if first_in == 0:
        tl.store(bias_grad_ptr + out_channel, bias_total, mask=out_channel < out_channels)
