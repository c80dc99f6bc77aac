"""Triton kernel of the per-sample variance, and the pieces of it that the Bias Loss kernels are built from.

A sample is cut into slices, each reduced by one program to (shift, mean - shift, variance). Means are kept relative to a shift
near the data, so that a mean of a thousand standard deviations costs no accuracy, neither within a slice nor when slices are
merged. The last program to arrive merges all slices, in a fixed order: results are deterministic.

Sums of squares are infinite long before the variance is: where they are, they are summed once more of deviations that are
scaled down, and what is merged are variances.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from biasloss_ext.ops.triton_finish import is_last
from biasloss_ext.ops.triton_map_kernels import between

_SMALLER = tl.constexpr(2.0**-40)
_LARGER = tl.constexpr(2.0**40)


class Slices(NamedTuple):
    """How samples of ``length`` are cut into slices, the last of which may be shorter; ``total`` is that of all samples."""

    length: Any
    slices: Any
    slice_length: Any
    total: Any


@triton.jit
def sum_slice(
    slice_ptr,
    count,
    shift,
    LANES: tl.constexpr,
    UNROLLED: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(mean, mean square) of the deviations from ``shift``; where SCALED, of 2^-40 times the deviations."""
    # One load of UNROLLED x LANES elements, so that a thread has UNROLLED of its 16-byte loads in flight.
    tile = tl.arange(0, UNROLLED)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    sums = tl.zeros([LANES], DTYPE)
    squares = tl.zeros([LANES], DTYPE)
    for start in range(0, count, LANES * UNROLLED):
        index = start + tile
        inside = index < count
        x = tl.load(slice_ptr + index, mask=inside, other=0.0).to(DTYPE)
        deviation = tl.where(inside, x - shift, 0.0)
        if SCALED:
            deviation *= _SMALLER
        sums += tl.sum(deviation, 0)
        squares += tl.sum(deviation * deviation, 0)
    values = count.to(DTYPE)
    return tl.sum(sums, 0) / values, tl.sum(squares, 0) / values


@triton.jit
def store_slice_moments(
    program,
    features_ptr,
    moments_ptr,
    sample_stride,
    cut,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    UNROLLED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Reduce slice ``program % cut.slices`` of sample ``program // cut.slices``.

    The stride and the lengths of ``cut``, which are `Slices`, count vectors of VECTOR elements: the multiplication by a
    constant tells the compiler what addresses and bounds are divisible by, so that it can load 16 bytes at a time.
    """
    sample = (program // cut.slices).to(tl.int64)
    begin = (program % cut.slices).to(tl.int64) * cut.slice_length
    count = tl.minimum(cut.length - begin, cut.slice_length).to(tl.int32) * VECTOR
    slice_ptr = features_ptr + sample * sample_stride * VECTOR + begin * VECTOR
    lanes = tl.arange(0, LANES)

    # B deviations from the mean of all, squared and summed, are at least B times the square of their mean: a shift taken
    # from LANES elements inflates the sum of squares by at most the ratio of the slice's length to LANES, outliers or not.
    # It is kept among the elements: a rounded mean of equal ones may differ from them, at 1e30 by more than can be squared.
    exists = lanes < count
    head = tl.load(slice_ptr + lanes, mask=exists, other=0.0).to(DTYPE)
    smallest = tl.min(tl.where(exists, head, float("inf")), 0)
    largest = tl.max(tl.where(exists, head, -float("inf")), 0)
    shift = between(tl.sum(head, 0) / tl.minimum(count, LANES).to(DTYPE), smallest, largest)

    mean, square = sum_slice(slice_ptr, count, shift, LANES, UNROLLED, False, DTYPE)
    variance = square - mean * mean
    if variance - variance != 0.0:  # not finite
        mean, square = sum_slice(slice_ptr, count, shift, LANES, UNROLLED, True, DTYPE)
        variance = (square - mean * mean) * _LARGER * _LARGER
        mean *= _LARGER
    variance = tl.where(variance < 0.0, 0.0, variance)  # not a maximum, which would swallow a NaN
    slice_index = program.to(tl.int64)
    tl.store(moments_ptr + slice_index, shift)
    tl.store(moments_ptr + slice_index + cut.total, mean)
    tl.store(moments_ptr + slice_index + cut.total * 2, variance)


@triton.jit
def merged_variance(moments_ptr, sample, in_batch, cut, SLICES: tl.constexpr, DTYPE: tl.constexpr):
    """Unbiased variance of the samples ``sample``, a block of indices; the lengths of ``cut`` count elements. For the last
    program (`is_last`).

    SLICES slices at a time are reduced around their common mean and then merged with those before (Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979), weighted by their shares of the
    elements so far.
    """
    first = sample.to(tl.int64) * cut.slices
    reference = tl.load(moments_ptr + first, mask=in_batch, other=0.0, cache_modifier=".cg")
    mean = tl.zeros_like(reference)  # relative to the reference
    variance = tl.zeros_like(reference)
    before = tl.full([], 0.0, DTYPE)
    for start in range(0, cut.slices, SLICES):
        slice_index = start + tl.arange(0, SLICES)
        rest = cut.length - slice_index.to(tl.int64) * cut.slice_length
        count = tl.maximum(tl.minimum(rest, cut.slice_length), 0).to(DTYPE)
        inside = in_batch[:, None] & (slice_index < cut.slices)[None, :]
        pointers = moments_ptr + first[:, None] + slice_index[None, :]
        shift = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
        means = tl.load(pointers + cut.total, mask=inside, other=0.0, cache_modifier=".cg")
        # Where there is no slice the count is 0, but NaN or infinity would still come through a product with it.
        means = tl.where(inside, (shift - reference[:, None]) + means, 0.0)
        variances = tl.load(pointers + cut.total * 2, mask=inside, other=0.0, cache_modifier=".cg")

        here = tl.sum(count, 0)
        share = (count / here)[None, :]
        mean_here = tl.sum(means * share, 1)
        deviation = means - mean_here[:, None]
        variance_here = tl.sum(variances * share + deviation * (deviation * share), 1)
        delta = mean_here - mean
        fraction = here / (before + here)
        rest_of_one = before / (before + here)
        mean += delta * fraction
        variance = variance * rest_of_one + variance_here * fraction + delta * (delta * (rest_of_one * fraction))
        before += here
    return variance * (before / tl.maximum(before - 1.0, 1.0))


@triton.jit
def widen_extrema(negated_min, maximum, variance, in_batch):
    """Take a block of variances into the lane-wise (-min, max); one that is NaN or infinite makes both infinite."""
    finite = variance - variance == 0.0
    infinity = float("inf")
    lower = tl.where(in_batch, tl.where(finite, -variance, infinity), -infinity)
    upper = tl.where(in_batch, tl.where(finite, variance, infinity), -infinity)
    return tl.maximum(negated_min, lower), tl.maximum(maximum, upper)


@triton.jit
def finish_variances(
    moments_ptr,
    variance_ptr,
    samples,
    cut,
    SAMPLES: tl.constexpr,
    SLICES: tl.constexpr,
    DTYPE: tl.constexpr,
    RESULT: tl.constexpr,
):
    """Store the variance of every sample; lane-wise (-min, max) over the batch, both as RESULT. For the last program."""
    negated_min = tl.full([SAMPLES], -float("inf"), RESULT)
    maximum = tl.full([SAMPLES], -float("inf"), RESULT)
    for start in range(0, samples, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        in_batch = sample < samples
        variance = merged_variance(moments_ptr, sample, in_batch, cut, SLICES, DTYPE).to(RESULT)
        tl.store(variance_ptr + sample, variance, mask=in_batch)
        negated_min, maximum = widen_extrema(negated_min, maximum, variance, in_batch)
    return negated_min, maximum


@triton.jit(do_not_specialize=["sample_stride", "length", "slices", "slice_length", "total_slices", "samples"])
def variance_kernel(
    features_ptr,
    moments_ptr,
    variance_ptr,
    extrema_ptr,
    ticket_ptr,
    sample_stride,
    length,
    slices,
    slice_length,
    total_slices,
    samples,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    UNROLLED: tl.constexpr,
    SAMPLES: tl.constexpr,
    SLICES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One slice a program; the last one computes the variance of every sample, and (-min, max) over the batch."""
    cut = Slices(length, slices, slice_length, total_slices)
    store_slice_moments(tl.program_id(0), features_ptr, moments_ptr, sample_stride, cut, VECTOR, LANES, UNROLLED, DTYPE)
    if is_last(ticket_ptr, total_slices):
        in_elements = Slices(length * VECTOR, slices, slice_length * VECTOR, total_slices)
        negated_min, maximum = finish_variances(
            moments_ptr, variance_ptr, samples, in_elements, SAMPLES, SLICES, DTYPE, DTYPE
        )
        tl.store(extrema_ptr, tl.max(negated_min, 0))
        tl.store(extrema_ptr + 1, tl.max(maximum, 0))
