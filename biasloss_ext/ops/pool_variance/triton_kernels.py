"""Triton kernels of the pool. A program takes a block of channels over a chunk of one sample's positions."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops.triton_finish import Back, columns_from, finish_sums, is_last, merge_sums
from biasloss_ext.ops.triton_map_kernels import (
    Tile,
    below,
    clear_outside,
    derivative,
    load_channels,
    load_tile,
    normalize,
    store_tile,
    sum_deviations,
)


@triton.jit
def place_of(program, blocks, chunks, positions, chunk_rows):
    """(block of channels, chunk, sample, first row of the map, rows of the chunk)."""
    chunk = (program // blocks) % chunks
    sample = (program // blocks // chunks).to(tl.int64)
    first_row = sample * positions + chunk.to(tl.int64) * chunk_rows
    count = tl.minimum(positions - chunk * chunk_rows, chunk_rows).to(tl.int32)
    return program % blocks, chunk, sample, first_row, count


@triton.jit
def store_slice_moments(
    partials_ptr, slice_index, slices, shift, total, squares, rows, columns, exists, CHANNELS: tl.constexpr
):
    """Leave the moments of a slice, columns of ``rows`` values each: quantities reference, mean - reference, m2 and count of
    (4, slices). The columns are merged around their common mean, which is kept relative to the first column's shift."""
    reference = tl.sum(tl.where(tl.arange(0, CHANNELS) == 0, shift, 0.0), 0)
    mean = total / rows
    m2 = squares - total * mean
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # not a maximum, which would swallow a NaN
    relative = tl.where(exists, (shift - reference) + mean, 0.0)
    mean_of_all = tl.sum(relative, 0) / columns
    deviation = tl.where(exists, relative - mean_of_all, 0.0)
    m2_of_all = tl.sum(tl.where(exists, m2, 0.0), 0) + rows * tl.sum(deviation * deviation, 0)
    pointer = partials_ptr + slice_index
    tl.store(pointer, reference)
    tl.store(pointer + slices, mean_of_all)
    tl.store(pointer + slices * 2, m2_of_all)
    tl.store(pointer + slices * 3, rows * columns)


@triton.jit
def variance_of_slices(partials_ptr, slices, SLICES: tl.constexpr, DTYPE: tl.constexpr):
    """The unbiased variance of a sample from what `store_slice_moments` left of its slices, SLICES at a time (Chan, Golub and
    LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979)."""
    first = tl.load(partials_ptr, cache_modifier=".cg")
    mean = tl.full([], 0.0, DTYPE)
    m2 = tl.full([], 0.0, DTYPE)
    before = tl.full([], 0.0, DTYPE)
    for start in range(0, slices, SLICES):
        index = start + tl.arange(0, SLICES)
        inside = index < slices
        pointers = partials_ptr + index
        reference = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
        means = tl.load(pointers + slices, mask=inside, other=0.0, cache_modifier=".cg")
        m2s = tl.load(pointers + slices * 2, mask=inside, other=0.0, cache_modifier=".cg")
        count = tl.load(pointers + slices * 3, mask=inside, other=0.0, cache_modifier=".cg")
        # Where there is no slice the count is 0, but NaN or infinity would still come through a product with it.
        means = tl.where(inside, (reference - first) + means, 0.0)
        here = tl.sum(count, 0)
        mean_here = tl.sum(means * count, 0) / here
        deviation = means - mean_here
        delta = mean_here - mean
        fraction = here / (before + here)
        mean += delta * fraction
        m2 += tl.sum(m2s + deviation * deviation * count, 0) + delta * delta * (before * fraction)
        before += here
    return m2 / tl.maximum(before - 1.0, 1.0)


@triton.jit(do_not_specialize=["samples", "positions", "units", "blocks", "chunks", "chunk_rows"])
def pool_kernel(
    x_ptr,
    affine_ptr,
    pooled_ptr,
    variance_ptr,
    partial_pools_ptr,
    partial_moments_ptr,
    tickets_ptr,
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
    CHUNKS: tl.constexpr,
    SLICES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The chunk's part of the mean of every channel, which the last program of a block of channels adds up where there are
    several chunks; and where the variance is wanted the moments of the slice, which the last program of the sample merges.
    Tickets: one for each sample and block, then one for each sample."""
    program = tl.program_id(0)
    channels = units * VECTOR
    block, chunk, sample, first_row, count = place_of(program, blocks, chunks, positions, chunk_rows)
    first_channel = block * CHANNELS
    tile = Tile(first_row, first_row + count, first_channel, channels)
    shift, total, squares = sum_deviations(x_ptr, affine_ptr, tile, count, ACTIVATION, ROWS, CHANNELS, DTYPE)
    at = columns_from(first_channel, channels, CHANNELS)
    rows = count.to(DTYPE)
    positions_of_all = (positions + tl.zeros([CHANNELS], tl.int32)).to(DTYPE)
    part = (shift * rows + total) / positions_of_all
    if partial_pools_ptr is None:
        tl.store(pooled_ptr + sample * channels + at.column, part, mask=at.exists)
    else:
        parts_ptr = partial_pools_ptr + sample * chunks * channels
        tl.store(parts_ptr + chunk * channels + at.column, part, mask=at.exists)
        if is_last(tickets_ptr + sample * blocks + block, chunks):
            pooled = merge_sums(parts_ptr, chunks, at, CHUNKS, CHANNELS, DTYPE)
            tl.store(pooled_ptr + sample * channels + at.column, pooled, mask=at.exists)

    if partial_moments_ptr is not None:
        columns = tl.minimum(channels - first_channel, CHANNELS).to(DTYPE)
        slices = chunks * blocks
        moments_ptr = partial_moments_ptr + sample * slices * 4
        store_slice_moments(
            moments_ptr, chunk * blocks + block, slices, shift, total, squares, rows, columns, at.exists, CHANNELS
        )
        if is_last(tickets_ptr + samples.to(tl.int64) * blocks + sample, slices):
            tl.store(variance_ptr + sample, variance_of_slices(moments_ptr, slices, SLICES, DTYPE))


@triton.jit(do_not_specialize=["samples", "positions", "units", "blocks", "chunks", "chunk_rows"])
def backward_kernel(
    pool_grad_ptr,
    x_ptr,
    affine_ptr,
    moments_ptr,
    grad_x_ptr,
    coefficients_ptr,
    partials_ptr,
    tickets_ptr,
    eps: tl.float64,
    samples,
    positions,
    units,
    blocks,
    chunks,
    chunk_rows,
    ACTIVATION: tl.constexpr,
    FROZEN: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """du of the chunk, and where moments are given its two sums; the last program of a block of channels finishes the
    coefficients."""
    program = tl.program_id(0)
    channels = units * VECTOR
    block, chunk, sample, first_row, count = place_of(program, blocks, chunks, positions, chunk_rows)
    first_channel = block * CHANNELS
    tile = Tile(first_row, first_row + count, first_channel, channels)
    positions_of_all = (positions + tl.zeros([CHANNELS], tl.int32)).to(DTYPE)
    share = load_channels(pool_grad_ptr + sample * channels, first_channel, channels, CHANNELS) / positions_of_all
    totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    centered_totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    for row in range(0, count, ROWS):
        here = below(tile, row)
        x = load_tile(x_ptr, here, ROWS, CHANNELS).to(DTYPE)
        du = share[None, :] * derivative(normalize(x, affine_ptr, here, CHANNELS), ACTIVATION)
        store_tile(grad_x_ptr, here, du, ROWS, CHANNELS)
        if moments_ptr is not None:
            center = load_channels(moments_ptr, first_channel, channels, CHANNELS)
            du = clear_outside(du, here, ROWS, CHANNELS)
            totals += du
            centered_totals += du * (x - center[None, :])
    if moments_ptr is not None:
        finish_sums(
            (tl.sum(totals, 0), tl.sum(centered_totals, 0)),
            Back(coefficients_ptr, affine_ptr, moments_ptr, eps),
            partials_ptr,
            tickets_ptr + block,
            sample * chunks + chunk,
            samples * chunks,
            columns_from(first_channel, channels, CHANNELS),
            samples.to(tl.int64) * positions,
            FROZEN,
            GROUPS,
            CHANNELS,
            DTYPE,
        )
