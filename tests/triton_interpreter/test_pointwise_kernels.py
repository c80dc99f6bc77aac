"""Kernels of the 1x1 convolution: blocks of either side, tiles, groups, chunks and splits beyond the first, every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter.against_reference import assert_matches, parameter, random_map

from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.pointwise import op, reference
from biasloss_ext.ops.pointwise import triton as pointwise

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def forward_arguments(shape: tuple[int, ...], out: int, dtype: torch.dtype, activation: int, full: bool) -> Any:
    n, c, h, w = shape
    x, weight = random_map(*shape, dtype=dtype), parameter(out, c, 1, 1, dtype=dtype)
    if not full:
        return x, weight, None, maps.IDENTITY, None, None, maps.IDENTITY, None, True
    affine, bias, gate = (parameter(*size, dtype=dtype) for size in ((2, c), (out,), (n, c)))
    return x, weight, affine, activation, gate, bias, maps.RELU, random_map(n, out, h, w, dtype=dtype), True


def backward_arguments(shape: tuple[int, ...], out: int, dtype: torch.dtype, activation: int, full: bool) -> Any:
    n, c, h, w = shape
    x, weight = random_map(*shape, dtype=dtype), parameter(out, c, 1, 1, dtype=dtype)
    grad, y = (random_map(n, out, h, w, dtype=dtype, mean=0.1) for _ in range(2))
    if not full:
        return grad, None, None, x, weight, None, None, maps.IDENTITY, None, None, True, True
    affine, center, coefficients, gate = (parameter(*size, dtype=dtype) for size in ((2, c), (c,), (4, out), (n, c)))
    residual_grad = random_map(*shape, dtype=dtype)
    return grad, y, coefficients, x, weight, affine, center, activation, gate, residual_grad, True, True


def assert_both_match(shape: tuple[int, ...], out: int, dtype: torch.dtype, activation: int, full: bool) -> None:
    arguments = forward_arguments(shape, out, dtype, activation, full)
    assert_matches(pointwise.pointwise, reference.pointwise, arguments)
    arguments = backward_arguments(shape, out, dtype, activation, full)
    assert_matches(pointwise.pointwise_backward, reference.pointwise_backward, arguments)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype"),
    [(24, 40, BF16), (72, 24, F16), (40, 72, F32), (5, 3, F32), (5, 3, F16), (72, 136, F16), (136, 72, F32)],
)
def test_widths(inputs: int, outputs: int, dtype: torch.dtype, full: bool) -> None:
    torch.manual_seed(inputs)
    assert_both_match((2, inputs, 9, 5), outputs, dtype, maps.HARDSWISH, full)


@pytest.mark.parametrize("shape", [(1, 20, 3, 3), (2, 5, 1, 7)])
def test_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_both_match(shape, 17, F64, maps.SILU, True)


@settings(max_examples=8, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 48), st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 48),
    st.sampled_from([F32, F16]),
    st.integers(maps.IDENTITY, maps.SILU),
)
def test_drawn_shapes(shape: tuple[int, ...], out: int, dtype: torch.dtype, activation: int) -> None:
    torch.manual_seed(0)
    assert_both_match(shape, out, dtype, activation, True)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_behind_a_norm_without_a_gate(dtype: torch.dtype) -> None:
    """Rows past the last one: neither dy nor h is zero there of itself."""
    torch.manual_seed(0)
    arguments = backward_arguments((1, 8, 3, 5), 24, dtype, maps.HARDSWISH, True)
    assert_matches(pointwise.pointwise_backward, reference.pointwise_backward, (*arguments[:8], None, *arguments[9:]))


@pytest.mark.parametrize("dtype", [F32, F16])
def test_groups_chunks_and_splits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(shared, "WANTED_PROGRAMS", 6)
    monkeypatch.setattr(pointwise, "PARTIAL_SHARE", 1)
    shape, out = (2, 24, 19, 16), 16
    tiles = pointwise.tiles_of(torch.empty(0, dtype=dtype), 24, out, pointwise.DATA_STEP)
    chunks = shared.groups_of(19 * 16, tiles.rows, 2)
    assert chunks.number > 1 and chunks.tiles > 1
    assert_both_match(shape, out, dtype, maps.RELU, True)


def test_what_is_not_wanted_is_left_out() -> None:
    torch.manual_seed(0)
    x, weight, *rest = forward_arguments((2, 8, 3, 4), 6, F32, maps.RELU, True)
    _, moments = pointwise.pointwise(x, weight, *rest[:-1], False)
    assert moments.numel() == 0
    full = list(backward_arguments((2, 8, 3, 4), 6, F32, maps.RELU, True))
    wanted = pointwise.pointwise_backward(*full)
    only_weight = pointwise.pointwise_backward(*full[:6], None, maps.RELU, full[8], None, False, True)
    assert torch.equal(only_weight[1], wanted[1])
    assert only_weight[0].numel() == only_weight[3].numel() == 0
    only_sums = pointwise.pointwise_backward(*full[:10], False, False)
    assert only_sums[0].numel() == only_sums[1].numel() == 0
    assert torch.equal(only_sums[2], wanted[2]) and torch.equal(only_sums[3], wanted[3])
    full[2] = None  # y alone says nothing
    assert_matches(pointwise.pointwise_backward, reference.pointwise_backward, tuple(full))


def test_moments_far_from_zero() -> None:
    """Of outputs whose mean is 1000 standard deviations."""
    torch.manual_seed(0)
    x, weight = random_map(2, 16, 12, 11, mean=0.0, std=1.0), parameter(8, 16, 1, 1) / 4
    bias = 1000 * weight.square().sum((1, 2, 3)).sqrt()
    y, moments = pointwise.pointwise(x, weight, None, 0, None, bias, 0, None, True)
    torch.testing.assert_close(moments.double(), maps.moments_of(y.double()), rtol=2e-6, atol=0)


def test_other_layouts() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 4, 6), parameter(6, 8, 1, 1)
    affine = parameter(8, 2).t()
    arguments = (
        x[:, :, ::2],
        weight.contiguous(memory_format=torch.channels_last),
        affine,
        1,
        None,
        None,
        0,
        None,
        True,
    )
    assert_matches(pointwise.pointwise, reference.pointwise, arguments)


def test_empty_batch() -> None:
    x, weight = torch.empty(0, 8, 2, 2), torch.ones(4, 8, 1, 1)
    y, moments = pointwise.pointwise(x, weight, None, 0, None, None, 0, None, True)
    assert y.shape == (0, 4, 2, 2) and moments.tolist() == [[0.0] * 4] * 2
    gradients = pointwise.pointwise_backward(
        y, None, None, x, weight, None, None, 0, torch.ones(0, 8), None, True, True
    )
    assert [g.shape for g in gradients] == [(0, 8, 2, 2), (4, 8, 1, 1), (0, 8), (0,)]
    assert gradients[1].abs().sum() == 0


def test_float32_is_not_cut_to_tf32_unless_torch_is_told() -> None:
    def precision(dtype: torch.dtype) -> str:
        chosen: str = shared.precision_of_products(torch.empty(0, dtype=dtype))["PRECISION"]
        return chosen

    assert precision(F32) == "tf32x3"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert precision(F32) == "tf32"
        assert precision(F16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("check", ["forward", "backward"])
def test_as_an_op(check: str) -> None:
    torch.manual_seed(0)

    def checked(overload: Any, arguments: tuple[Tensor, ...]) -> None:
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))

    if check == "forward":
        checked(op.forward.triton, forward_arguments((2, 8, 3, 4), 6, F32, maps.RELU, True))
        return
    arguments = backward_arguments((2, 8, 3, 4), 6, F16, maps.RELU, True)
    checked(op.backward.triton, arguments)
    checked(op.backward.triton, (*arguments[:6], None, *arguments[7:]))
