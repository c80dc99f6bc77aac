"""Kernels of the 1x1 convolution: blocks of either side, tiles, groups, chunks and sets beyond the first, every option."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.nn.inference_block import packed
from biasloss_ext.ops import maps
from biasloss_ext.ops import triton_maps as shared
from biasloss_ext.ops.pointwise import op, reference, triton_backward, triton_tiles
from biasloss_ext.ops.pointwise import triton as pointwise
from tests.triton_interpreter.against_reference import assert_matches, parameter, random_map

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Case(NamedTuple):
    arguments: tuple[Tensor, ...]
    options: dict[str, Any]

    def but(self, **options: Any) -> Case:
        return Case(self.arguments, {**self.options, **options})


def norm_of(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    names = ("norm_weight", "norm_bias", "running_mean", "running_var")
    return {name: parameter(channels, dtype=dtype).abs() for name in names} | {
        "num_batches_tracked": torch.tensor(3),
        "momentum": 0.3,
        "eps": 1e-3,
    }


def forward_case(shape: tuple[int, ...], out: int, dtype: torch.dtype, activation: int, full: bool) -> Case:
    n, c, h, w = shape
    arguments = random_map(*shape, dtype=dtype), parameter(out, c, 1, 1, dtype=dtype)
    if not full:
        return Case(arguments, {"want_statistics": True})
    options = {
        "affine": parameter(2, c, dtype=dtype),
        "activation": activation,
        "gate": parameter(n, c, dtype=dtype),
        "bias": parameter(out, dtype=dtype),
        "output_activation": maps.RELU,
        "residual": random_map(n, out, h, w, dtype=dtype),
        "want_statistics": True,
        **norm_of(out, dtype),
    }
    return Case(arguments, options)


def backward_case(shape: tuple[int, ...], out: int, dtype: torch.dtype, activation: int, full: bool) -> Case:
    n, c, h, w = shape
    grad, y = (random_map(n, out, h, w, dtype=dtype, mean=0.1) for _ in range(2))
    arguments = grad, random_map(*shape, dtype=dtype), parameter(out, c, 1, 1, dtype=dtype)
    if not full:
        return Case(arguments, {})
    options = {
        "y": y,
        "y_coefficients": parameter(6, out, dtype=dtype),
        "affine": parameter(2, c, dtype=dtype),
        "moments": parameter(2, c, dtype=dtype).abs(),
        "activation": activation,
        "gate": parameter(n, c, dtype=dtype),
        "residual_grad": random_map(*shape, dtype=dtype),
        "eps": 1e-3,
    }
    return Case(arguments, options)


def assert_forward_matches(case: Case) -> None:
    assert_matches(pointwise.pointwise, reference.pointwise, *case)


def assert_backward_matches(case: Case) -> None:
    assert_matches(pointwise.pointwise_backward, reference.pointwise_backward, *case)


def assert_both_match(shape: tuple[int, ...], out: int, dtype: torch.dtype, activation: int, full: bool) -> None:
    assert_forward_matches(forward_case(shape, out, dtype, activation, full))
    case = backward_case(shape, out, dtype, activation, full)
    assert_backward_matches(case)
    if full:
        assert_backward_matches(case.but(gate=None))


@pytest.fixture
def _fresh_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans made under other rules."""
    monkeypatch.setattr(pointwise, "_plans", {})
    monkeypatch.setattr(triton_backward, "_plans", {})


def plan_of_backward() -> triton_backward.Plan:
    *_, plan = triton_backward._plans.values()
    return plan


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


@pytest.mark.usefixtures("_fresh_plans")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("one_read", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_groups_chunks_and_sets(
    dtype: torch.dtype, one_read: bool, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(triton_tiles, "WANTED_PROGRAMS", 8)
    monkeypatch.setattr(triton_tiles, "PARTIAL_SHARE", 0.01)
    if not one_read:
        monkeypatch.setattr(triton_tiles, "one_read_tiles", lambda *_: None)
    case = backward_case((2, 24, 19, 16), 16, dtype, maps.RELU, True)
    assert_backward_matches(case if gated else case.but(gate=None))
    plan = plan_of_backward()
    assert plan.data is not None and plan.data.constants["CHUNKED"]
    assert plan.one_read == one_read == (plan.weight is None)
    assert plan.weight_sets > 24 * 16  # of which each has several groups
    assert plan.weight_partials > plan.weight_sets
    case = forward_case((2, 24, 19, 16), 16, dtype, maps.RELU, True)
    assert_forward_matches(case)
    (forward_plan,) = pointwise._plans.values()
    assert forward_plan.partials > 2 * (3 * 16 + 1)


@pytest.mark.parametrize("dtype", [F16, F32, F64])
def test_frozen_statistics(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = backward_case((2, 8, 3, 5), 24, dtype, maps.HARDSWISH, True).but(gate=None, frozen=True)
    assert_backward_matches(case)
    coefficients = pointwise.pointwise_backward(*case.arguments, **case.options)[4]
    assert coefficients[1:3].abs().sum() == 0


@pytest.mark.usefixtures("_fresh_plans")
@pytest.mark.parametrize("one_read", [False, True])
def test_any_origin(one_read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dy that sums to zero, a mean of 1000 standard deviations costs float32 no digit of the weight's gradient."""
    torch.manual_seed(0)
    if not one_read:
        monkeypatch.setattr(triton_tiles, "one_read_tiles", lambda *_: None)
    x, weight = random_map(2, 16, 8, 4, mean=1000.0, std=1.0), parameter(8, 16, 1, 1)
    grad = random_map(2, 8, 8, 4, dtype=F64)
    grad = (grad - grad.mean((0, 2, 3), keepdim=True)).float()
    y, y_coefficients = random_map(2, 8, 8, 4), torch.zeros(6, 8)
    y_coefficients[0] = 1
    y_coefficients[2] = -grad.double().mean((0, 2, 3)).float()
    options = {"y": y, "y_coefficients": y_coefficients}
    dy = maps.gradient_behind_norm(grad.double(), y.double(), y_coefficients.double())
    centered = x.double() - x.double().mean((0, 2, 3), keepdim=True)
    exact = torch.einsum("nohw,nihw->oi", dy, centered)[:, :, None, None]
    errors = [
        (pointwise.pointwise_backward(grad, x, weight, **options, any_origin=free)[1] - exact).abs().max().item()
        for free in (False, True)
    ]
    assert plan_of_backward().one_read == one_read
    assert errors[1] < 1e-6 * exact.abs().max() and errors[1] < errors[0] / 10


def test_what_is_not_wanted_is_left_out() -> None:
    torch.manual_seed(0)
    case = forward_case((2, 8, 3, 4), 6, F32, maps.RELU, True)
    _, statistics = pointwise.pointwise(*case.arguments, **case.but(want_statistics=False).options)
    assert statistics.numel() == 0 and case.options["num_batches_tracked"] == 3
    full = backward_case((2, 8, 3, 4), 6, F32, maps.RELU, True)

    def run(**options: Any) -> tuple[Tensor, ...]:
        return pointwise.pointwise_backward(*full.arguments, **full.but(**options).options)

    wanted = run()
    only_weight = run(moments=None, residual_grad=None, want_x=False)
    assert torch.equal(only_weight[1], wanted[1])
    assert only_weight[0].numel() == only_weight[3].numel() == only_weight[4].numel() == 0
    nothing_else = run(moments=None, residual_grad=None, gate=None, want_x=False)
    assert [t.numel() for t in nothing_else] == [0, 48, 0, 0, 0]
    only_sums = run(want_x=False, want_weight=False)
    assert only_sums[0].numel() == only_sums[1].numel() == 0
    assert torch.equal(only_sums[2], wanted[2]) and torch.equal(only_sums[3], wanted[3])
    assert_backward_matches(full.but(y_coefficients=None))  # y alone says nothing


@pytest.mark.parametrize("missing", ["norm_weight", "norm_bias", "running_mean", "running_var", "num_batches_tracked"])
def test_each_part_of_the_norm_may_be_missing(missing: str) -> None:
    torch.manual_seed(0)
    assert_forward_matches(forward_case((2, 8, 3, 4), 6, F32, maps.RELU, True).but(**{missing: None}))


def test_batches_are_counted_once() -> None:
    """By one of the blocks of channels."""
    torch.manual_seed(0)
    case = forward_case((1, 8, 3, 4), 136, F32, maps.RELU, True)
    pointwise.pointwise(*case.arguments, **case.options)
    assert case.options["num_batches_tracked"] == 4


@pytest.mark.parametrize("dtype", [F16, F32])
def test_statistics_far_from_zero(dtype: torch.dtype) -> None:
    """Of outputs whose mean is 1000 standard deviations, over two groups of rows."""
    torch.manual_seed(0)
    x, weight = random_map(2, 16, 12, 11, mean=0.0, std=1.0, dtype=dtype), parameter(8, 16, 1, 1) / 4
    bias = 1000 * weight.square().sum((1, 2, 3)).sqrt()
    y, statistics = pointwise.pointwise(x, weight, bias=bias, want_statistics=True)
    torch.testing.assert_close(statistics[:2].double(), maps.moments_of(y.double()), rtol=2e-6, atol=0)


def test_calls_after_the_first_are_the_same_to_the_bit() -> None:
    """Tickets are left as they were found."""
    torch.manual_seed(0)
    case = backward_case((2, 24, 9, 5), 40, F32, maps.HARDSWISH, True).but(gate=None)
    first, second = (pointwise.pointwise_backward(*case.arguments, **case.options) for _ in range(2))
    assert all(map(torch.equal, first, second))
    case = forward_case((2, 24, 9, 5), 40, F32, maps.HARDSWISH, False)
    first, second = (pointwise.pointwise(*case.arguments, **case.options) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("layout", ["packed", "transposed", "every other"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_weights_of_any_strides(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = parameter(40, 24, 1, 1, dtype=dtype)
    weight = {
        "packed": packed(plain),
        "transposed": plain.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": parameter(80, 48, 1, 1, dtype=dtype)[::2, ::2],
    }[layout]
    for case, match in (
        (forward_case((2, 24, 5, 3), 40, dtype, maps.RELU, True), assert_forward_matches),
        (backward_case((2, 24, 5, 3), 40, dtype, maps.RELU, True), assert_backward_matches),
    ):
        match(Case((*case.arguments[:-1], weight), case.options))


def test_weight_in_the_dtype_of_the_map() -> None:
    """As it is prepared once for many calls: the same to the bit, since the product rounds it to that dtype anyway."""
    torch.manual_seed(0)
    x, weight = random_map(2, 24, 5, 3, dtype=F16), parameter(40, 24, 1, 1)
    grad = random_map(2, 40, 5, 3, dtype=F16)
    outputs = [
        (pointwise.pointwise(x, w, want_statistics=True), pointwise.pointwise_backward(grad, x, w))
        for w in (weight, weight.half())
    ]
    for ours, rounded in zip(*outputs, strict=True):
        assert all(map(torch.equal, ours, rounded))


def test_other_layouts() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 4, 6), parameter(6, 8, 1, 1)
    arguments = x[:, :, ::2], weight.contiguous(memory_format=torch.channels_last)
    options = {"affine": parameter(8, 2).t(), "activation": 1, "want_statistics": True}
    assert_forward_matches(Case(arguments, options))
    case = backward_case((2, 8, 4, 6), 6, F32, maps.RELU, True)
    for name in ("y", "residual_grad"):
        case.options[name] = case.options[name].contiguous()
    grad, x, weight = case.arguments
    assert_backward_matches(Case((grad.contiguous(), x.contiguous(), weight), case.options))


def test_empty_batch() -> None:
    shape = (0, 8, 2, 2)
    assert_both_match(shape, 4, F32, maps.RELU, True)
    case = backward_case(shape, 4, F32, maps.RELU, True)
    gradients = pointwise.pointwise_backward(*case.arguments, **case.options)
    assert [g.shape for g in gradients] == [shape, (4, 8, 1, 1), shape[:2], (4, *shape[:2]), (0,)]
    assert gradients[1].abs().sum() == 0


def test_float32_is_not_cut_to_tf32_unless_torch_is_told() -> None:
    def precision(dtype: torch.dtype) -> str:
        chosen: str = shared.precision_of_products(torch.empty(0, dtype=dtype))["PRECISION"]
        return chosen

    def planned() -> str:
        case = backward_case((1, 4, 2, 2), 4, F32, maps.RELU, False)
        pointwise.pointwise_backward(*case.arguments)
        launch = plan_of_backward().data
        assert launch is not None
        return str(launch.constants["PRECISION"])

    assert precision(F32) == planned() == "tf32x3"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert precision(F32) == planned() == "tf32"
        assert precision(F16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("check", ["forward", "backward", "backward without a gate"])
def test_as_an_op(check: str) -> None:
    torch.manual_seed(0)
    if check == "forward":
        overload, case = op.forward.triton, forward_case((2, 8, 3, 4), 6, F32, maps.RELU, True)
    else:
        overload, case = op.backward.triton, backward_case((2, 8, 3, 4), 6, F16, maps.RELU, True)
    if check == "backward without a gate":
        case = case.but(gate=None)
    torch.library.opcheck(overload, *case, test_utils=("test_schema", "test_faketensor"))
