"""Pieces of the Triton kernels on feature maps: tiles, activations, sums, and what a kernel's last program finishes.

A channels_last map is a matrix: one row a position of a sample, channels along it. A program holds ROWS x CHANNELS of it at a
time. Launches pass a number of channels as vectors of VECTOR elements: the multiplication by a constant tells the compiler
what addresses and bounds are divisible by, which is what it needs to load 16 bytes at a time.

What is summed over more rows than a program has goes to memory as one partial result a program. The last program to arrive
(`is_last`) merges them in a fixed order, so results are deterministic, and finishes the job: the statistics of a batch
normalization (`finish_statistics`) or the coefficients of its backward pass (`finish_coefficients`). Terms:
:mod:`biasloss_ext.ops.maps`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from biasloss_ext.ops import maps

_RELU = tl.constexpr(maps.RELU)
_RELU6 = tl.constexpr(maps.RELU6)
_HARDSWISH = tl.constexpr(maps.HARDSWISH)
_SILU = tl.constexpr(maps.SILU)
_HARDSIGMOID = tl.constexpr(maps.HARDSIGMOID)
_SIGMOID = tl.constexpr(maps.SIGMOID)


@triton.jit
def between(x, low, high):
    """x, but at least low and at most high; keeps a NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def divided(x, y):
    """x / y, rounded correctly: Triton's own operator is an approximation in float32."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    """Rounded correctly, as `divided`."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def logistic(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """h = act(u)."""
    if ACTIVATION == _RELU:
        return tl.where(u < 0.0, 0.0, u)
    elif ACTIVATION == _RELU6:
        return between(u, 0.0, 6.0)
    elif ACTIVATION == _HARDSWISH:
        return u * between(u + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACTIVATION == _SILU:
        return u * logistic(u)
    elif ACTIVATION == _HARDSIGMOID:
        return between(u + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACTIVATION == _SIGMOID:
        return logistic(u)
    else:
        return u


@triton.jit
def derivative(u, ACTIVATION: tl.constexpr):
    """act'(u), with torch's own values at the kinks."""
    if ACTIVATION == _RELU:
        return tl.where(u > 0.0, 1.0, 0.0).to(u.dtype)
    elif ACTIVATION == _RELU6:
        return tl.where((u > 0.0) & (u < 6.0), 1.0, 0.0).to(u.dtype)
    elif ACTIVATION == _HARDSWISH:
        return tl.where(u <= -3.0, 0.0, tl.where(u < 3.0, u * (1.0 / 3.0) + 0.5, 1.0))
    elif ACTIVATION == _SILU:
        s = logistic(u)
        return s * (1.0 + u * (1.0 - s))
    elif ACTIVATION == _HARDSIGMOID:
        return tl.where((u > -3.0) & (u < 3.0), 1.0 / 6.0, 0.0).to(u.dtype)
    elif ACTIVATION == _SIGMOID:
        s = logistic(u)
        return s * (1.0 - s)
    else:
        return tl.full(u.shape, 1.0, u.dtype)


@triton.jit
def tile_of(first_row, rows, first_channel, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(offsets from the tile's first row, which of them exist). ``first_row`` in 64 bits, what is in the tile in 32."""
    row = tl.arange(0, ROWS)
    channel = first_channel + tl.arange(0, CHANNELS)
    left = tl.minimum(rows - first_row, ROWS).to(tl.int32)
    inside = (row < left)[:, None] & (channel < channels)[None, :]
    return row[:, None] * channels + channel[None, :], inside


@triton.jit
def load_channels(ptr, first_channel, channels, CHANNELS: tl.constexpr):
    """One value a channel, 0 past the last."""
    channel = first_channel + tl.arange(0, CHANNELS)
    return tl.load(ptr + channel, mask=channel < channels, other=0.0)


@triton.jit
def normalise(x, affine_ptr, first_channel, channels, CHANNELS: tl.constexpr):
    """u = scale * x + shift, or x where there is no affine."""
    if affine_ptr is not None:
        scale = load_channels(affine_ptr, first_channel, channels, CHANNELS)
        shift = load_channels(affine_ptr + channels, first_channel, channels, CHANNELS)
        return x * scale[None, :] + shift[None, :]
    else:
        return x


@triton.jit
def gradient_behind_norm(du, y, coefficients_ptr, first_channel, channels, CHANNELS: tl.constexpr):
    """dy = a * du + b * (y - center) + c."""
    a = load_channels(coefficients_ptr, first_channel, channels, CHANNELS)
    b = load_channels(coefficients_ptr + channels, first_channel, channels, CHANNELS)
    c = load_channels(coefficients_ptr + channels * 2, first_channel, channels, CHANNELS)
    center = load_channels(coefficients_ptr + channels * 3, first_channel, channels, CHANNELS)
    return a[None, :] * du + b[None, :] * (y - center[None, :]) + c[None, :]


@triton.jit
def product(a, b, accumulator, ROUNDED: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + a @ b, the factors rounded to ROUNDED, then handed to the multiplication as FACTOR. No dot of float64:
    older GPUs and compilers lack it."""
    if tl.float64 == ROUNDED:
        return accumulator + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a.to(ROUNDED).to(FACTOR), b.to(ROUNDED).to(FACTOR), accumulator, input_precision=PRECISION)


@triton.jit
def sum_deviations(
    x_ptr,
    affine_ptr,
    first_row,
    count,
    first_channel,
    channels,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(shift, sum of h - shift, sum of its square) of every column over ``count`` rows; h = act(affine(x)).

    The shift is the mean of the first tile. B deviations from the mean of all, squared and summed, are at least B times the
    square of their mean: such a shift inflates the sum of squares by at most the ratio of ``count`` to ROWS.
    """
    end = first_row + count
    offsets, inside = tile_of(first_row, end, first_channel, channels, ROWS, CHANNELS)
    head = tl.load(x_ptr + first_row * channels + offsets, mask=inside, other=0.0).to(DTYPE)
    head = activate(normalise(head, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
    infinity = float("inf")
    smallest = tl.min(tl.where(inside, head, infinity), 0)
    largest = tl.max(tl.where(inside, head, -infinity), 0)
    # A rounded mean of equal values may differ from them, and at 1e30 the square of that difference is infinite.
    shift = between(tl.sum(tl.where(inside, head, 0.0), 0) / tl.minimum(count, ROWS).to(DTYPE), smallest, largest)
    totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    squares = tl.zeros([ROWS, CHANNELS], DTYPE)
    for row in range(0, count, ROWS):
        offsets, inside = tile_of(first_row + row, end, first_channel, channels, ROWS, CHANNELS)
        x = tl.load(x_ptr + (first_row + row) * channels + offsets, mask=inside, other=0.0).to(DTYPE)
        h = activate(normalise(x, affine_ptr, first_channel, channels, CHANNELS), ACTIVATION)
        deviation = tl.where(inside, h - shift[None, :], 0.0)
        totals += deviation
        squares += deviation * deviation
    return shift, tl.sum(totals, 0), tl.sum(squares, 0)


@triton.jit
def store_moments(partials_ptr, group, groups, column, columns, count, shift, total, squares):
    """Leave the moments of ``count`` values a column, from the sums of their deviations from ``shift`` and of the squares of
    these: rows shift, mean - shift and m2 (the squared deviations from the mean), each (groups, columns), then the counts."""
    mean = total / count
    m2 = squares - total * mean
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # not a maximum, which would swallow a NaN
    row = groups.to(tl.int64) * columns
    offsets = group.to(tl.int64) * columns + column
    tl.store(partials_ptr + offsets, shift, mask=column < columns)
    tl.store(partials_ptr + row + offsets, mean, mask=column < columns)
    tl.store(partials_ptr + row * 2 + offsets, m2, mask=column < columns)
    tl.store(partials_ptr + row * 3 + group, count)


@triton.jit
def is_last(ticket_ptr, total):
    """Whether this is the last of ``total`` programs to call this with the ticket, which that program leaves at 0.

    What any of the programs stored before its call, the last one may load after its own, with ``cache_modifier=".cg"``:

    - Before: the stores of all threads come before the barrier, and the barrier before the atomic operation of the one
      thread that executes it. A release is cumulative in the PTX memory model: it also publishes what happened before it in
      other threads of the block. The scope is the GPU.
    - Between: the atomic operations on one ticket form a release sequence, and the last of them acquires from all before.
    - After: Triton hands the result from that one thread to the others through shared memory, behind a barrier, so that what
      it acquired happened before their loads too. ``.cg`` loads from the L2 cache: a line of the L1 cache, which other
      multiprocessors do not update, cannot serve them.

    Nobody else touches the ticket between the last arrival and the next launch of the stream: a plain store resets it.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == total - 1
    tl.store(ticket_ptr, 0, mask=last)
    tl.debug_barrier()
    return last


@triton.jit
def merge_moments(
    partials_ptr,
    groups,
    columns,
    column,
    exists,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(mean, m2, count) of the columns ``column`` from what `store_moments` left; for the last program (`is_last`).

    Lane by lane, GROUPS groups at a time, and then over the lanes (Chan, Golub and LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances", 1979): no exchange between threads holds up the loads. Means are kept relative
    to the first group's shift, so that a mean of a thousand standard deviations costs no accuracy.
    """
    row = groups.to(tl.int64) * columns
    reference = tl.load(partials_ptr + column, mask=exists, other=0.0, cache_modifier=".cg")
    counts = tl.zeros([GROUPS], DTYPE)
    means = tl.zeros([GROUPS, COLUMNS], DTYPE)
    m2s = tl.zeros([GROUPS, COLUMNS], DTYPE)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None] & exists[None, :]
        count = tl.load(partials_ptr + row * 3 + group, mask=group < groups, other=0.0, cache_modifier=".cg")
        pointers = partials_ptr + group.to(tl.int64)[:, None] * columns + column[None, :]
        shift = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
        mean = tl.load(pointers + row, mask=inside, other=0.0, cache_modifier=".cg")
        m2 = tl.load(pointers + row * 2, mask=inside, other=0.0, cache_modifier=".cg")

        together = counts + count
        fraction = count / tl.maximum(together, 1.0)
        # Where there is no group the fraction is 0, but NaN or infinity would still come through a product with it.
        delta = tl.where(inside, (shift - reference[None, :]) + mean - means, 0.0)
        means += delta * fraction[:, None]
        m2s += m2 + delta * delta * (counts * fraction)[:, None]
        counts = together
    total = tl.sum(counts, 0)
    mean_of_all = tl.sum(means * counts[:, None], 0) / total
    deviation = means - mean_of_all[None, :]
    return reference + mean_of_all, tl.sum(m2s + deviation * deviation * counts[:, None], 0), total


@triton.jit
def merge_sums(
    partials_ptr,
    groups,
    columns,
    column,
    exists,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sum over the groups of partials (groups, columns), for the columns ``column``; for the last program (`is_last`)."""
    total = tl.zeros([GROUPS, COLUMNS], DTYPE)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None] & exists[None, :]
        offsets = group.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partials_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def finish_statistics(
    statistics_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    column,
    columns,
    exists,
    mean,
    variance,
    count,
    momentum,
    eps,
):
    """Store rows mean, biased variance, scale and shift of the columns ``column``, and move the running statistics.

    Any pointer but the first may be None. ``count`` values went into a column; with none the running statistics stay.
    """
    scale = divided(tl.full(mean.shape, 1.0, mean.dtype), square_root(variance + tl.full([], eps, mean.dtype)))
    if norm_weight_ptr is not None:
        scale *= tl.load(norm_weight_ptr + column, mask=exists, other=0.0)
    shift = -scale * mean
    if norm_bias_ptr is not None:
        shift += tl.load(norm_bias_ptr + column, mask=exists, other=0.0)
    tl.store(statistics_ptr + column, mean, mask=exists)
    tl.store(statistics_ptr + columns + column, variance, mask=exists)
    tl.store(statistics_ptr + columns * 2 + column, scale, mask=exists)
    tl.store(statistics_ptr + columns * 3 + column, shift, mask=exists)

    values = tl.full(mean.shape, count, mean.dtype)
    tracked = exists & (values > 0.0)
    step = tl.full([], momentum, mean.dtype)
    if running_mean_ptr is not None:
        running_mean = tl.load(running_mean_ptr + column, mask=exists, other=0.0)
        tl.debug_barrier()  # no thread stores what another has yet to load
        tl.store(running_mean_ptr + column, running_mean + step * (mean - running_mean), mask=tracked)
    if running_var_ptr is not None:
        running_var = tl.load(running_var_ptr + column, mask=exists, other=0.0)
        unbiased = variance * divided(values, tl.maximum(values - 1.0, 1.0))
        tl.debug_barrier()
        tl.store(running_var_ptr + column, running_var + step * (unbiased - running_var), mask=tracked)


@triton.jit
def count_batch(num_batches_tracked_ptr):
    """One batch more, or nothing where the pointer is None; for exactly one program of a launch."""
    if num_batches_tracked_ptr is not None:
        batches = tl.load(num_batches_tracked_ptr)
        tl.debug_barrier()
        tl.store(num_batches_tracked_ptr, batches + 1)


@triton.jit
def finish_coefficients(
    coefficients_ptr,
    affine_ptr,
    moments_ptr,
    column,
    columns,
    exists,
    sum_du,
    sum_du_away,
    count,
    eps,
    FROZEN: tl.constexpr,
):
    """Store the six rows of the coefficients of the columns ``column``, from sum(du) and sum(du * (y - mean))."""
    scale = tl.load(affine_ptr + column, mask=exists, other=0.0)
    mean = tl.load(moments_ptr + column, mask=exists, other=0.0)
    variance = tl.load(moments_ptr + columns + column, mask=exists, other=0.0)
    one = tl.full(mean.shape, 1.0, mean.dtype)
    rstd = divided(one, square_root(variance + tl.full([], eps, mean.dtype)))
    weight_grad = rstd * sum_du_away
    if FROZEN:
        b = tl.zeros_like(mean)
        c = tl.zeros_like(mean)
    else:
        share = -scale * divided(one, tl.full(mean.shape, count, mean.dtype))
        b = share * rstd * weight_grad
        c = share * sum_du
    tl.store(coefficients_ptr + column, scale, mask=exists)
    tl.store(coefficients_ptr + columns + column, b, mask=exists)
    tl.store(coefficients_ptr + columns * 2 + column, c, mask=exists)
    tl.store(coefficients_ptr + columns * 3 + column, mean, mask=exists)
    tl.store(coefficients_ptr + columns * 4 + column, weight_grad, mask=exists)
    tl.store(coefficients_ptr + columns * 5 + column, sum_du, mask=exists)
