"""Triton kernels of the pool. A program takes a block of channels over a chunk of one sample's positions."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.triton_map_kernels import derivative, load_channels, normalise, sum_deviations, tile_of


@triton.jit
def place_of(program, blocks, chunks, positions, chunk_rows):
    """(block of channels, chunk, sample, first row of the map, rows of the chunk)."""
    chunk = (program // blocks) % chunks
    sample = (program // blocks // chunks).to(tl.int64)
    first_row = sample * positions + chunk.to(tl.int64) * chunk_rows
    count = tl.minimum(positions - chunk * chunk_rows, chunk_rows).to(tl.int32)
    return program % blocks, chunk, sample, first_row, count


@triton.jit(do_not_specialize=["samples", "positions", "units", "blocks", "chunks", "chunk_rows"])
def pool_kernel(
    x_ptr,
    affine_ptr,
    pooled_ptr,
    partials_ptr,
    samples,
    positions,
    units,
    blocks,
    chunks,
    chunk_rows,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The chunk's part of the mean of every channel, and where the variance is wanted the moments of the whole slice, in the
    layout of `store_moments` with one column a sample."""
    program = tl.program_id(0)
    channels = units * VECTOR
    block, chunk, sample, first_row, count = place_of(program, blocks, chunks, positions, chunk_rows)
    first_channel = block * CHANNELS
    shift, total, squares = sum_deviations(
        x_ptr, affine_ptr, first_row, count, first_channel, channels, ACTIVATION, ROWS, CHANNELS, DTYPE
    )
    column = first_channel + tl.arange(0, CHANNELS)
    exists = column < channels
    rows = count.to(DTYPE)
    positions_of_all = (positions + tl.zeros([CHANNELS], tl.int32)).to(DTYPE)
    part = (shift * rows + total) / positions_of_all
    tl.store(pooled_ptr + (sample * chunks + chunk) * channels + column, part, mask=exists)

    if partials_ptr is not None:
        # Columns of rows values each, merged around their common mean, which is kept relative to the first column's shift.
        columns = tl.minimum(channels - first_channel, CHANNELS).to(DTYPE)
        reference = tl.sum(tl.where(tl.arange(0, CHANNELS) == 0, shift, 0.0), 0)
        mean = total / rows
        m2 = squares - total * mean
        m2 = tl.where(m2 < 0.0, 0.0, m2)  # not a maximum, which would swallow a NaN
        relative = tl.where(exists, (shift - reference) + mean, 0.0)
        mean_of_all = tl.sum(relative, 0) / columns
        deviation = tl.where(exists, relative - mean_of_all, 0.0)
        m2_of_all = tl.sum(tl.where(exists, m2, 0.0), 0) + rows * tl.sum(deviation * deviation, 0)
        slices = chunks * blocks
        slice_index = (chunk * blocks + block).to(tl.int64)
        row = slices.to(tl.int64) * samples
        pointer = partials_ptr + slice_index * samples + sample
        tl.store(pointer, reference)
        tl.store(pointer + row, mean_of_all)
        tl.store(pointer + row * 2, m2_of_all)
        if sample == 0:
            tl.store(partials_ptr + row * 3 + slice_index, rows * columns)


@triton.jit(do_not_specialize=["samples", "positions", "units", "blocks", "chunks", "chunk_rows"])
def backward_kernel(
    pool_grad_ptr,
    x_ptr,
    affine_ptr,
    center_ptr,
    grad_x_ptr,
    partials_ptr,
    samples,
    positions,
    units,
    blocks,
    chunks,
    chunk_rows,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """du of the chunk, and where a center is given its two sums."""
    program = tl.program_id(0)
    channels = units * VECTOR
    block, chunk, sample, first_row, count = place_of(program, blocks, chunks, positions, chunk_rows)
    first_channel = block * CHANNELS
    positions_of_all = (positions + tl.zeros([CHANNELS], tl.int32)).to(DTYPE)
    share = load_channels(pool_grad_ptr + sample * channels, first_channel, channels, CHANNELS) / positions_of_all
    totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    away_totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    for row in range(0, count, ROWS):
        offsets, inside = tile_of(first_row + row, first_row + count, first_channel, channels, ROWS, CHANNELS)
        start = (first_row + row) * channels
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        du = share[None, :] * derivative(normalise(x, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
        tl.store(grad_x_ptr + start + offsets, du.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if center_ptr is not None:
            center = load_channels(center_ptr, first_channel, channels, CHANNELS)
            du = tl.where(inside, du, 0.0)
            totals += du
            away_totals += du * (x - center[None, :])
    if center_ptr is not None:
        column = first_channel + tl.arange(0, CHANNELS)
        pointers = partials_ptr + (sample * chunks + chunk) * channels + column
        tl.store(pointers, tl.sum(totals, 0), mask=column < channels)
        row = samples.to(tl.int64) * chunks * channels
        tl.store(pointers + row, tl.sum(away_totals, 0), mask=column < channels)
