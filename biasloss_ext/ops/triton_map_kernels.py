"""Pieces of the Triton kernels on feature maps.

A channels_last map is a matrix: one row a position of a sample, channels along it. A program holds ROWS x CHANNELS of it at a
time. Launches pass a number of channels as vectors of VECTOR elements: the multiplication by a constant tells the compiler
what addresses and bounds are divisible by, so that it can load 16 bytes at a time.

What is summed over more rows than a program has goes to memory as one partial result per program, and the last program merges
them in a fixed order (`triton_finish`): results are deterministic. Terms: :mod:`biasloss_ext.ops.maps`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from biasloss_ext.ops import maps

_RELU = tl.constexpr(maps.RELU)
_RELU6 = tl.constexpr(maps.RELU6)
_HARDSWISH = tl.constexpr(maps.HARDSWISH)
_SILU = tl.constexpr(maps.SILU)
_HARDSIGMOID = tl.constexpr(maps.HARDSIGMOID)
_SIGMOID = tl.constexpr(maps.SIGMOID)
_GELU = tl.constexpr(maps.GELU)
_GELU_TANH = tl.constexpr(maps.GELU_TANH)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_ZERO = tl.constexpr(1 / math.sqrt(2 * math.pi))
# 1 + tanh(v) = 2 * logistic(2 * v): the tanh form of GELU is u * logistic(u * (linear + cubic * u^2)).
_GELU_LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
_GELU_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)


class Tile(NamedTuple):
    """Where a tile of a map (rows, channels) begins, the row in 64 bits, and where the map ends."""

    first_row: Any
    rows: Any
    first_channel: Any
    channels: Any


@triton.jit
def between(x, low, high):
    """x, but at least low and at most high; keeps a NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def logistic(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def normal_distribution(u):
    return 0.5 * (1.0 + tl.erf(u * _SQRT_HALF))


@triton.jit
def gelu_tanh_derivative(u):
    # Behind the bounds the logistic function is 0 or 1, and the square of u might be infinite.
    bounded = between(u, -25.0, 25.0)
    square = bounded * bounded
    v = bounded * (_GELU_LINEAR + _GELU_CUBIC * square)
    e = tl.exp(-tl.abs(v))
    above = 1.0 / (1.0 + e)
    slope = _GELU_LINEAR + 3.0 * _GELU_CUBIC * square
    return tl.where(v < 0.0, e * above, above) + u * (e * above * above * slope)


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
    elif ACTIVATION == _GELU:
        return u * normal_distribution(u)
    elif ACTIVATION == _GELU_TANH:
        return u * logistic(u * (_GELU_LINEAR + _GELU_CUBIC * u * u))
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
    elif ACTIVATION == _GELU:
        return normal_distribution(u) + u * (tl.exp(-0.5 * u * u) * _DENSITY_AT_ZERO)
    elif ACTIVATION == _GELU_TANH:
        return gelu_tanh_derivative(u)
    else:
        return tl.full(u.shape, 1.0, u.dtype)


@triton.jit
def offsets_of(tile, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(offsets in a `Tile` from its first row, in 32 bits, and which of them exist)."""
    row = tl.arange(0, ROWS)
    channel = tile.first_channel + tl.arange(0, CHANNELS)
    left = tl.minimum(tile.rows - tile.first_row, ROWS).to(tl.int32)
    inside = (row < left)[:, None] & (channel < tile.channels)[None, :]
    return row[:, None] * tile.channels + channel[None, :], inside


@triton.jit
def load_tile(ptr, tile, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A `Tile` of the map at ``ptr``, 0 past the last row and the last channel."""
    offsets, inside = offsets_of(tile, ROWS, CHANNELS)
    return tl.load(ptr + tile.first_row * tile.channels + offsets, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, tile, values, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    offsets, inside = offsets_of(tile, ROWS, CHANNELS)
    pointers = ptr + tile.first_row * tile.channels + offsets
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def clear_outside(values, tile, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The values of a `Tile`, 0 past the last row and the last channel."""
    _, inside = offsets_of(tile, ROWS, CHANNELS)
    return tl.where(inside, values, 0.0)


@triton.jit
def below(tile, rows):
    """The `Tile` that begins ``rows`` further down."""
    return Tile(tile.first_row + rows, tile.rows, tile.first_channel, tile.channels)


@triton.jit
def load_channels(ptr, first_channel, channels, CHANNELS: tl.constexpr):
    """One value a channel, 0 past the last."""
    channel = first_channel + tl.arange(0, CHANNELS)
    return tl.load(ptr + channel, mask=channel < channels, other=0.0)


@triton.jit
def normalize(x, affine_ptr, tile, CHANNELS: tl.constexpr):
    """u = scale * x + shift, or x where there is no affine."""
    if affine_ptr is not None:
        scale = load_channels(affine_ptr, tile.first_channel, tile.channels, CHANNELS)
        shift = load_channels(affine_ptr + tile.channels, tile.first_channel, tile.channels, CHANNELS)
        return x * scale[None, :] + shift[None, :]
    else:
        return x


@triton.jit
def gradient_behind_norm(du, y, coefficients_ptr, tile, CHANNELS: tl.constexpr):
    """dy = a * du + b * (y - center) + c."""
    first_channel, channels = tile.first_channel, tile.channels
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
def load_activated(
    x_ptr,
    affine_ptr,
    tile,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """h = act(affine(x)) of a `Tile`. Rows past the last hold what act makes of the shift."""
    x = load_tile(x_ptr, tile, ROWS, CHANNELS).to(DTYPE)
    return activate(normalize(x, affine_ptr, tile, CHANNELS), ACTIVATION)


@triton.jit
def sum_deviations(
    x_ptr,
    affine_ptr,
    tile,
    count,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(shift, sum of h - shift, sum of its square) of every column over the ``count`` rows of a `Tile`; h = act(affine(x)).

    The shift is the mean of the first tile. B deviations from the mean of all, squared and summed, are at least B times the
    square of their mean: such a shift inflates the sum of squares by at most the ratio of ``count`` to ROWS.
    """
    head = load_activated(x_ptr, affine_ptr, tile, ACTIVATION, ROWS, CHANNELS, DTYPE)
    _, inside = offsets_of(tile, ROWS, CHANNELS)
    smallest = tl.min(tl.where(inside, head, float("inf")), 0)
    largest = tl.max(tl.where(inside, head, -float("inf")), 0)
    # A rounded mean of equal values may differ from them, and at 1e30 the square of that difference is infinite.
    shift = between(tl.sum(tl.where(inside, head, 0.0), 0) / tl.minimum(count, ROWS).to(DTYPE), smallest, largest)
    totals = tl.zeros([ROWS, CHANNELS], DTYPE)
    squares = tl.zeros([ROWS, CHANNELS], DTYPE)
    for row in range(0, count, ROWS):
        here = below(tile, row)
        h = load_activated(x_ptr, affine_ptr, here, ACTIVATION, ROWS, CHANNELS, DTYPE)
        deviation = clear_outside(h - shift[None, :], here, ROWS, CHANNELS)
        totals += deviation
        squares += deviation * deviation
    return shift, tl.sum(totals, 0), tl.sum(squares, 0)


@triton.jit
def store_moments(partials_ptr, group, groups, at, count, shift, total, squares):
    """Leave the moments of ``count`` values in each of the `Columns` ``at``, from the sums of their deviations from ``shift``
    and of the squares of these: rows shift, mean - shift and m2 (the squared deviations from the mean), each (groups,
    columns), then the counts."""
    mean = total / count
    m2 = squares - total * mean
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # not a maximum, which would swallow a NaN
    row = groups.to(tl.int64) * at.columns
    offsets = group.to(tl.int64) * at.columns + at.column
    tl.store(partials_ptr + offsets, shift, mask=at.exists)
    tl.store(partials_ptr + row + offsets, mean, mask=at.exists)
    tl.store(partials_ptr + row * 2 + offsets, m2, mask=at.exists)
    tl.store(partials_ptr + row * 3 + group, count)
