"""expand_depthwise and its backward against float64, over drawn shapes, kernels, strides, dtypes and activations."""

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

from biasloss_ext.nn.inference_block import packed, taps_first
from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise.op import output_size
from biasloss_ext.ops.expand_depthwise import op, reference

Arguments = tuple[Any, ...]


def forward(backend: str, arguments: Arguments) -> tuple[Tensor, ...]:
    return op.forward(*arguments, device=CPU, backend=backend)


def activate(backend: str, arguments: Arguments) -> tuple[Tensor, ...]:
    return op.activate(*arguments, device=CPU, backend=backend)


def backward(backend: str, arguments: Arguments) -> tuple[Tensor, ...]:
    return op.backward(*arguments, device=CPU, backend=backend)


@st.composite
def operands(draw: st.DrawFn) -> tuple[Source, Arguments]:
    """x, expand_weight, affine, activation, weight, stride"""
    source, narrow, channels = Source(draw), draw(st.sampled_from((1, 3, 16, 24))), draw(st.sampled_from(CHANNELS))
    kernel, activation, stride = (draw(st.sampled_from(values)) for values in ((3, 5, 7), ACTIVATIONS, (1, 2)))
    x = source.map(draw(st.integers(0, 3)), narrow, draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES)))
    weight = source.values(channels, 1, kernel, kernel)
    return source, (x, source.exact(channels, narrow, 1, 1), source.affine(channels), activation, weight, stride)


@st.composite
def forward_cases(draw: st.DrawFn) -> Arguments:
    return (*draw(operands())[1], draw(st.booleans()))


@st.composite
def activate_cases(draw: st.DrawFn) -> Arguments:
    source, of_y = draw(operands())
    y_affine = source.affine(of_y[4].shape[0])
    return (*of_y, y_affine, draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans()))


@st.composite
def backward_cases(draw: st.DrawFn) -> Arguments:
    source, (x, expand_weight, affine, activation, weight, stride) = draw(operands())
    samples, narrow, height, width = x.shape
    channels = weight.shape[0]
    out = (samples, channels, output_size(height, stride), output_size(width, stride))
    grad, pool_grad = source.gradient(*out), source.values(samples, channels)
    grad, pool_grad = draw(st.sampled_from(((grad, None), (None, pool_grad), (grad, pool_grad))))
    y, y_affine, coefficients = source.map(*out), source.affine(channels), source.values(4, channels)
    at_output = (grad, pool_grad, y, y_affine, coefficients, draw(st.sampled_from(ACTIVATIONS)))
    x_mean, center = source.values(narrow), source.values(channels)
    return (*at_output, x, x_mean, expand_weight, affine, center, activation, weight, stride)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(arguments=forward_cases())
def test_forward_agrees_with_float64(backend: str, arguments: Arguments) -> None:
    y, moments = forward(backend, arguments)
    cases.compare(("y",), (y,), lambda *a: reference.expand_depthwise(*a)[:1], arguments)
    if not arguments[-1]:
        assert moments.numel() == 0
        return
    exact, eps = maps.moments_of(y.double()), torch.finfo(moments.dtype).eps
    largest = y.abs().double().max().item() if y.numel() > 0 else 0.0
    torch.testing.assert_close(moments[0].double(), exact[0], rtol=8 * eps, atol=8 * eps * largest)
    torch.testing.assert_close(moments[1].double(), exact[1], rtol=64 * eps, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(arguments=activate_cases())
def test_activated_agrees_with_float64(backend: str, arguments: Arguments) -> None:
    cases.compare(("h", "pooled"), activate(backend, arguments), reference.activate, arguments)


@settings(max_examples=30, deadline=None)
@given(arguments=activate_cases())
def test_weights_as_the_kernels_read_them_change_no_bit(arguments: Arguments) -> None:
    x, expand_weight, affine, activation, weight, stride, *rest = arguments
    views = (packed(expand_weight), affine, activation, taps_first(weight), stride)
    assert torch.equal(views[0], expand_weight)
    assert torch.equal(views[3], weight)
    cases.assert_same(activate("cpu", arguments), activate("cpu", (x, *views, *rest)))
    plain = (x, expand_weight, affine, activation, weight, stride, False)
    cases.assert_same(forward("cpu", plain), forward("cpu", (x, *views, False)))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(arguments=backward_cases())
def test_backward_agrees_with_float64(backend: str, arguments: Arguments) -> None:
    gradients = backward(backend, arguments)
    names = ("grad_x", "grad_expand", "grad_weight", "sums")
    cases.compare(names, gradients, reference.expand_depthwise_backward, arguments)


# Wide enough to be cut into blocks of channels, high enough for several products a march, few enough samples for bands.
LARGE = """
from biasloss_ext.ops.expand_depthwise import op
g = torch.Generator().manual_seed(0)
normal = lambda *s: torch.randn(s, generator=g)
last = lambda t: t.contiguous(memory_format=torch.channels_last)
outputs = []
for kernel, stride, narrow in ((3, 1, 16), (5, 2, 24), (7, 1, 40)):
    x, weight, affine = last(normal(2, narrow, 29, 31)), normal(330, 1, kernel, kernel), normal(2, 330)
    expand = normal(330, narrow, 1, 1) / narrow**0.5
    y, moments = op.forward(x, expand, affine, 0, weight, stride, True, device=x.device, backend="cpu")
    b = (last(normal(*y.shape)), None, y, normal(2, 330), normal(4, 330), 0, x, normal(narrow))
    gradients = op.backward(*b, expand, affine, normal(330), 0, weight, stride, device=x.device, backend="cpu")
    h, pooled = op.activate(x, expand, affine, 3, weight, stride, b[3], 3, True, device=x.device, backend="cpu")
    outputs += [y, moments, *gradients, h, pooled]
"""


def large_outputs(backend: str = "cpu") -> list[Tensor]:
    scope: dict[str, Any] = {"torch": torch}
    exec(LARGE.replace('"cpu"', repr(backend)), scope)
    return scope["outputs"]


def test_bits_do_not_depend_on_threads_or_runs() -> None:
    once = cases.with_threads(1, large_outputs)
    for threads in (2, 3):
        cases.assert_same(once, cases.with_threads(threads, large_outputs))
    cases.assert_same(once, large_outputs())


def test_instruction_sets_and_the_reference_agree(tmp_path: Path) -> None:
    expected = large_outputs("reference")
    for name in ("avx512", "avx2", "baseline"):
        for a, b in zip(expected, cases.outputs_with(name, LARGE, tmp_path), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 * float(a.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schema_and_shape_functions(dtype: torch.dtype) -> None:
    checks = ("test_schema", "test_faketensor")
    x = maps.channels_last(torch.randn(2, 6, 9, 6).to(dtype))
    expand_weight, affine, weight = torch.randn(20, 6, 1, 1), torch.randn(2, 20), torch.randn(20, 1, 5, 5)
    of_forward = (x, expand_weight, affine, maps.RELU6, weight, 2, True)
    y = reference.expand_depthwise(*of_forward)[0]
    at_output = (torch.randn_like(y), torch.randn(2, 20), y, affine, torch.randn(4, 20), maps.HARDSWISH)
    rest = (x, torch.randn(6), expand_weight, affine, torch.randn(20), maps.RELU6, weight, 2)
    torch.library.opcheck(op.forward.native, of_forward, test_utils=checks)
    torch.library.opcheck(op.activate.native, (*of_forward[:-1], affine, maps.HARDSWISH, True), test_utils=checks)
    torch.library.opcheck(op.backward.native, (*at_output, *rest), test_utils=checks)


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_maps_without_rows_or_columns(size: tuple[int, int]) -> None:
    x = torch.randn(2, 6, *size).contiguous(memory_format=torch.channels_last)
    affine, weights = torch.randn(2, 24), (torch.randn(24, 6, 1, 1), torch.randn(24, 1, 3, 3))
    of_y = (x, weights[0], affine, maps.RELU, weights[1], 1)
    y, _ = forward("cpu", (*of_y, False))
    h, pooled = activate("cpu", (*of_y, affine, maps.RELU, True))
    assert y.shape == h.shape == (2, 24, *size)
    assert pooled.isnan().all()
    at_output = (torch.ones_like(y), None, y, affine, torch.randn(4, 24), maps.RELU)
    gradients = backward("cpu", (*at_output, x, torch.zeros(6), weights[0], affine, torch.zeros(24), *of_y[3:]))
    assert all(not gradient.any() for gradient in gradients)


def test_an_expansion_of_other_channels_is_an_error() -> None:
    x = maps.channels_last(torch.randn(1, 6, 5, 5))
    with pytest.raises(RuntimeError, match=r"expand_weight: expected \(20, 6, 1, 1\)"):
        forward("cpu", (x, torch.randn(20, 5, 1, 1), torch.randn(2, 20), 0, torch.randn(20, 1, 3, 3), 1, False))


def test_weights_of_another_dtype_are_an_error() -> None:
    x, affine = maps.channels_last(torch.randn(1, 6, 5, 5)), torch.randn(2, 20)
    expand_weight, weight = torch.randn(20, 6, 1, 1), torch.randn(20, 1, 3, 3)
    with pytest.raises(RuntimeError, match="expand_weight: expected the accumulation dtype"):
        forward("cpu", (x, packed(expand_weight.double()), affine, 0, weight, 1, False))
    with pytest.raises(RuntimeError, match="weight: expected the accumulation dtype"):
        forward("cpu", (x, expand_weight, affine, 0, taps_first(weight.double()), 1, False))
