"""depthwise and depthwise_backward against float64, over drawn shapes, kernels, strides, dtypes and activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import depthwise_cases as cases
import pytest
import torch
from depthwise_cases import ACTIVATIONS, BACKENDS, CHANNELS, CPU, SIZES, Source
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import op, reference

Arguments = tuple[Any, ...]


def forward(backend: str, arguments: Arguments) -> tuple[Tensor, ...]:
    return op.forward(*arguments, device=CPU, backend=backend)


def backward(backend: str, arguments: Arguments) -> tuple[Tensor, ...]:
    return op.backward(*arguments, device=CPU, backend=backend)


@st.composite
def forward_cases(draw: st.DrawFn) -> Arguments:
    source, channels, kernel = Source(draw), draw(st.sampled_from(CHANNELS)), draw(st.sampled_from((3, 5, 7)))
    shape = (draw(st.integers(0, 3)), channels, draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES)))
    affine, activation = source.affine(channels), draw(st.sampled_from(ACTIVATIONS))
    mean = 0.0
    if draw(st.booleans()):
        affine, activation, mean = None, maps.IDENTITY, draw(st.sampled_from((0.0, 100.0)))
    weight = source.values(channels, 1, kernel, kernel)
    return source.map(*shape, mean=mean), weight, affine, activation, draw(st.integers(1, 2)), draw(st.booleans())


@st.composite
def backward_cases(draw: st.DrawFn) -> Arguments:
    source, channels, kernel = Source(draw), draw(st.sampled_from(CHANNELS)), draw(st.sampled_from((3, 5, 7)))
    samples, height, width = draw(st.integers(0, 3)), draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    stride = draw(st.integers(1, 2))
    out = (samples, channels, op.output_size(height, stride), op.output_size(width, stride))
    grad, pool_grad = source.gradient(*out), source.values(samples, channels)
    at_output: Arguments = (grad, None, None, None, None, maps.IDENTITY)
    if draw(st.booleans()):
        given_grad, given_pool = draw(st.sampled_from(((grad, None), (None, pool_grad), (grad, pool_grad))))
        normalised = (source.map(*out), source.affine(channels), source.values(4, channels))
        at_output = (given_grad, given_pool, *normalised, draw(st.sampled_from(ACTIVATIONS)))
    affine, activation = draw(
        st.sampled_from(((None, maps.IDENTITY), *((source.affine(channels), a) for a in ACTIVATIONS)))
    )
    weight = source.values(channels, 1, kernel, kernel)
    center = draw(st.sampled_from((None, source.values(channels))))
    x = source.map(samples, channels, height, width)
    return (*at_output, x, weight, affine, center, activation, stride, draw(st.booleans()), draw(st.booleans()))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(arguments=forward_cases())
def test_forward_agrees_with_float64(backend: str, arguments: Arguments) -> None:
    y, moments = forward(backend, arguments)
    cases.compare(("y",), (y,), lambda *a: reference.depthwise(*a)[:1], arguments)
    if not arguments[-1]:
        assert moments.numel() == 0
        return
    # Of the values as they are stored; the variance near to cancellation is as exact as that of torch's two passes.
    exact = maps.moments_of(y.double())
    eps = torch.finfo(moments.dtype).eps
    torch.testing.assert_close(
        moments[0].double(), exact[0], rtol=8 * eps, atol=8 * eps * y.abs().double().max().item() if y.numel() else 0
    )
    torch.testing.assert_close(moments[1].double(), exact[1], rtol=64 * eps, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(arguments=backward_cases())
def test_backward_agrees_with_float64(backend: str, arguments: Arguments) -> None:
    gradients = backward(backend, arguments)
    cases.compare(("grad_x", "grad_weight", "sums"), gradients, reference.depthwise_backward, arguments)


@st.composite
def one_of_each(draw: st.DrawFn) -> tuple[Arguments, Arguments]:
    return draw(forward_cases()), draw(backward_cases())


@settings(max_examples=10, deadline=None)
@given(both=one_of_each())
def test_bits_do_not_depend_on_threads_or_runs(both: tuple[Arguments, Arguments]) -> None:
    def run() -> tuple[Tensor, ...]:
        return *forward("cpu", both[0]), *backward("cpu", both[1])

    once = cases.with_threads(1, run)
    cases.assert_same(once, cases.with_threads(2, run))
    cases.assert_same(once, run())


LARGE = """
from biasloss_ext.ops.depthwise import op
g = torch.Generator().manual_seed(0)
normal = lambda *s: torch.randn(s, generator=g)
last = lambda t: t.contiguous(memory_format=torch.channels_last)
outputs = []
for kernel, stride in ((3, 1), (5, 2), (7, 1), (7, 2)):
    x, weight, affine = last(normal(2, 200, 29, 31)), normal(200, 1, kernel, kernel), normal(2, 200)
    y, moments = op.forward(x, weight, affine, 2, stride, True, device=x.device, backend="cpu")
    b = (last(normal(*y.shape)), None, y, normal(2, 200), normal(4, 200), 3)
    gradients = op.backward(*b, x, weight, affine, normal(200), 2, stride, True, True, device=x.device, backend="cpu")
    outputs += [y, moments, *gradients]
"""


def test_large_maps_are_cut_the_same_for_any_number_of_threads() -> None:
    def run() -> list[Tensor]:
        scope: dict[str, Any] = {"torch": torch}
        exec(LARGE, scope)
        return scope["outputs"]

    cases.assert_same(cases.with_threads(1, run), cases.with_threads(2, run))


def test_instruction_sets_agree(tmp_path: Path) -> None:
    best, *others = [cases.outputs_with(name, LARGE, tmp_path) for name in ("avx512", "avx2", "baseline")]
    for other in others:
        for a, b in zip(best, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 * float(a.abs().max()))


def test_moments_of_a_mean_far_above_the_spread() -> None:
    x = maps.channels_last(torch.randn(4, 40, 23, 17, generator=torch.Generator().manual_seed(0)) + 1000)
    weight = torch.zeros(40, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    y, moments = forward("cpu", (x, weight, None, maps.IDENTITY, 1, True))
    assert torch.equal(y, x)
    torch.testing.assert_close(moments[1].double(), maps.moments_of(x.double())[1], rtol=4e-6, atol=0)


def arguments_of_one_case(dtype: torch.dtype) -> tuple[Arguments, Arguments]:
    x = maps.channels_last(torch.randn(2, 20, 9, 6).to(dtype))
    weight, affine = torch.randn(20, 1, 5, 5), torch.randn(2, 20)
    y = reference.depthwise(x, weight, affine, maps.RELU6, 2, False)[0]
    at_output = (torch.randn_like(y), torch.randn(2, 20), y, affine, torch.randn(4, 20), maps.HARDSWISH)
    return (x, weight, affine, maps.RELU6, 2, True), (
        *at_output, x, weight, affine, torch.randn(20), maps.RELU6, 2, True, True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schema_and_shape_functions(dtype: torch.dtype) -> None:
    checks = ("test_schema", "test_faketensor")
    of_forward, of_backward = arguments_of_one_case(dtype)
    torch.library.opcheck(op.forward.native, of_forward, test_utils=checks)
    torch.library.opcheck(op.backward.native, of_backward, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(2, 20, 9, 6)}, "x: expected a dense channels_last map"),
        ({1: torch.randn(20, 1, 4, 4)}, "expected a kernel of 3, 5 or 7, got 4"),
        ({1: torch.randn(19, 1, 3, 3)}, "weight: expected"),
        ({2: torch.randn(2, 19)}, "affine: expected 40"),
        ({4: 3}, "stride: expected 1 or 2, got 3"),
    ],
)
def test_what_the_kernels_cannot_take_is_an_error(change: dict[int, Any], message: str) -> None:
    arguments = list(arguments_of_one_case(torch.float32)[0])
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        forward("cpu", tuple(arguments))
