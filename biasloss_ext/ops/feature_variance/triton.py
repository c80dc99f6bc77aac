"""``biasloss_ext::feature_variance_triton``: the launches. Two of them, no wait of the host, one small allocation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from biasloss_ext.ops.feature_variance import triton_kernels as kernels
from biasloss_ext.ops.library import accumulation_dtype

WARPS = 4
BYTES_PER_LOAD = 16  # the widest load of a thread
UNROLLED = 4  # loads of a thread in flight
LONGEST_SLICE = 32  # in heads of a slice, from which its shift is taken; bounds the rounding error
WANTED_PROGRAMS = 528  # four for each multiprocessor of the largest GPUs of today
TILE = 2048  # samples x slices that one step of the merge holds
MOST_SAMPLES = 1024  # of them: each has state beside its slices, which in float64 fills the registers


class Slicing(NamedTuple):
    """How a batch of features is cut. Lengths and strides count elements; all are multiples of ``vector``."""

    features: Tensor
    samples: int
    sample_stride: int
    length: int
    slices: int
    slice_length: int
    vector: int
    lanes: int


def samples_are_dense(features: Tensor) -> bool:
    """Whether each sample is one run of memory without gaps, its dimensions in whatever order."""
    if features.is_contiguous():
        return True
    expected = 1
    inner = zip(features.stride()[1:], features.shape[1:], strict=True)
    for stride, size in sorted(pair for pair in inner if pair[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def slicing(features: Tensor) -> Slicing:
    """Cut a batch into slices: enough programs for a GPU, none longer than its accuracy allows."""
    if not samples_are_dense(features):
        features = features.contiguous()
    samples, length = features.shape[0], math.prod(features.shape[1:])
    sample_stride = features.stride(0) if samples > 1 else length
    bytes_per_element = features.element_size()
    widest = BYTES_PER_LOAD // bytes_per_element
    vector = math.gcd(widest, length, sample_stride, features.data_ptr() // bytes_per_element)
    lanes = WARPS * 32 * widest
    wanted = min(triton.cdiv(WANTED_PROGRAMS, max(samples, 1)), triton.cdiv(length, lanes * UNROLLED))
    slices = max(wanted, triton.cdiv(length, lanes * LONGEST_SLICE))
    slice_length = triton.cdiv(triton.cdiv(length, slices), vector) * vector
    return Slicing(
        features, samples, sample_stride, length, triton.cdiv(length, slice_length), slice_length, vector, lanes
    )


def merge_tile(slices: int) -> dict[str, int]:
    """Few shapes, so that a smaller last batch rarely needs another kernel."""
    width = 1 if slices == 1 else 4 if slices <= 4 else 32
    return {"SAMPLES": min(TILE // width, MOST_SAMPLES), "SLICES": width}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype that tensors of ``dtype`` are accumulated in, as Triton calls it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def feature_variance(features: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(features.dtype)
    cut = slicing(features)
    total_slices = cut.samples * cut.slices
    variance = features.new_empty(cut.samples, dtype=dtype)
    extrema = features.new_empty(2, dtype=dtype)
    moments = features.new_empty(3 * total_slices, dtype=dtype)
    with torch.cuda.device_of(features):
        if total_slices > 0:
            kernels.slice_moments_kernel[(total_slices,)](
                cut.features,
                moments,
                cut.sample_stride // cut.vector,
                cut.length // cut.vector,
                cut.slices,
                cut.slice_length // cut.vector,
                total_slices,
                VECTOR=cut.vector,
                LANES=cut.lanes,
                UNROLLED=UNROLLED,
                DTYPE=triton_dtype(dtype),
                num_warps=WARPS,
            )
        kernels.variance_kernel[(1,)](
            moments,
            variance,
            extrema,
            cut.samples,
            cut.slices,
            total_slices,
            cut.length,
            cut.slice_length,
            **merge_tile(cut.slices),
            DTYPE=triton_dtype(dtype),
            num_warps=2 * WARPS,
        )
    return variance, extrema
