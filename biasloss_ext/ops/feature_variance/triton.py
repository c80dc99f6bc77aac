"""``biasloss_ext::feature_variance_triton``: one launch, no wait of the host, one small allocation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from biasloss_ext.ops.feature_variance import triton_kernels as kernels
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.triton_launch import Launch, divide_up, tickets

WARPS = 4
BYTES_PER_LOAD = 16  # the widest load of a thread
UNROLLED = 4  # loads of a thread in flight
LONGEST_SLICE = 32  # in heads of a slice, from which its shift is taken; bounds the rounding error
WANTED_PROGRAMS = 528  # four for each multiprocessor of the largest GPUs of today
TILE = 512  # samples x slices that one step of the merge holds
MOST_SAMPLES = 256  # of them: each has state beside its slices, which in float64 fills the registers


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
    wanted = min(divide_up(WANTED_PROGRAMS, max(samples, 1)), divide_up(length, lanes * UNROLLED))
    slices = max(wanted, divide_up(length, lanes * LONGEST_SLICE))
    slice_length = divide_up(divide_up(length, slices), vector) * vector
    return Slicing(
        features, samples, sample_stride, length, divide_up(length, slice_length), slice_length, vector, lanes
    )


def merge_tile(slices: int) -> dict[str, int]:
    """Few shapes, so that a smaller last batch rarely needs another kernel."""
    width = 1 if slices == 1 else 4 if slices <= 4 else 32
    return {"SAMPLES": min(TILE // width, MOST_SAMPLES), "SLICES": width}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype that tensors of ``dtype`` are accumulated in, as Triton calls it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def layout_of(features: Tensor) -> tuple[Any, ...]:
    """What a plan's key holds of features: all that `slicing` looks at."""
    return features.shape, features.stride(), features.dtype, features.data_ptr() % BYTES_PER_LOAD


class Plan(NamedTuple):
    """The launch for features of one layout."""

    launch: Launch
    in_place: bool  # the features are read as they are; else a contiguous copy is
    moments: int


_plans: dict[tuple[Any, ...], Plan] = {}


def _plan(features: Tensor) -> Plan:
    cut = slicing(features)
    total_slices = cut.samples * cut.slices
    launch = Launch(
        kernels.variance_kernel,
        total_slices,
        (
            cut.sample_stride // cut.vector,
            cut.length // cut.vector,
            cut.slices,
            cut.slice_length // cut.vector,
            total_slices,
            cut.samples,
        ),
        {
            "VECTOR": cut.vector,
            "LANES": cut.lanes,
            "UNROLLED": UNROLLED,
            **merge_tile(cut.slices),
            "DTYPE": triton_dtype(features.dtype),
            "num_warps": WARPS,
        },
    )
    return Plan(launch, cut.features is features, 3 * total_slices)


def feature_variance(features: Tensor) -> tuple[Tensor, Tensor]:
    dtype, device = accumulation_dtype(features.dtype), features.device
    key = (device, *layout_of(features))
    plan = _plans.get(key)
    if plan is None:
        if features.shape[0] == 0:
            return features.new_empty(0, dtype=dtype), features.new_full((2,), -torch.inf, dtype=dtype)
        plan = _plans[key] = _plan(features)
    variance = torch.empty(features.shape[0], dtype=dtype, device=device)
    extrema = torch.empty(2, dtype=dtype, device=device)
    plan.launch(
        features if plan.in_place else features.contiguous(),
        torch.empty(plan.moments, dtype=dtype, device=device),
        variance,
        extrema,
        tickets(features, 1),
    )
    return variance, extrema
