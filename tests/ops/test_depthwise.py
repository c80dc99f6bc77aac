"""depthwise and depthwise_backward against float64, over drawn shapes, kernels, strides, dtypes and activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext import functional
from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import op, reference
from tests import depthwise_cases as cases
from tests import norm_cases
from tests.calls import Call
from tests.depthwise_cases import BACKENDS, CHANNELS, SIZES, Source
from tests.ops.map_cases import MAP_ACTIVATIONS as ACTIVATIONS
from tests.runnable import other_variants, variant_in_use


@st.composite
def forward_cases(draw: st.DrawFn) -> Call:
    source, channels, kernel = Source(draw), draw(st.sampled_from(CHANNELS)), draw(st.sampled_from((3, 5, 7)))
    shape = (draw(st.integers(0, 3)), channels, draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES)))
    affine, activation = source.affine(channels), draw(st.sampled_from(ACTIVATIONS))
    mean = 0.0
    if draw(st.booleans()):
        affine, activation, mean = None, maps.IDENTITY, draw(st.sampled_from((0.0, 100.0)))
    weight = source.values(channels, 1, kernel, kernel)
    options = {"affine": affine, "activation": activation, "stride": draw(st.integers(1, 2))}
    options["same_padding"] = draw(st.booleans())
    options |= {"want_statistics": draw(st.booleans()), **norm_cases.drawn(channels, source.dtype, source.generator)}
    return Call((source.map(*shape, mean=mean), weight), options)


@st.composite
def backward_cases(draw: st.DrawFn) -> Call:
    source, channels, kernel = Source(draw), draw(st.sampled_from(CHANNELS)), draw(st.sampled_from((3, 5, 7)))
    samples, height, width = draw(st.integers(0, 3)), draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    stride = draw(st.integers(1, 2))
    out = (samples, channels, op.output_size(height, stride), op.output_size(width, stride))
    grad, pool_grad = source.gradient(*out), source.values(samples, channels)
    options: dict[str, Any] = {"grad": grad, "stride": stride, "same_padding": draw(st.booleans())}
    if draw(st.booleans()):
        given_grad, given_pool = draw(st.sampled_from(((grad, None), (None, pool_grad), (grad, pool_grad))))
        options |= {"grad": given_grad, "pool_grad": given_pool, "y": source.map(*out)}
        options |= {"y_affine": source.affine(channels), "y_coefficients": source.values(6, channels)}
        options["y_activation"] = draw(st.sampled_from(ACTIVATIONS))
    affine, activation = draw(
        st.sampled_from(((None, maps.IDENTITY), *((source.affine(channels), a) for a in ACTIVATIONS)))
    )
    x = source.map(samples, channels, height, width)
    moments = source.moments(channels) if affine is not None and draw(st.booleans()) else None
    options |= {"affine": affine, "activation": activation, "moments": moments}
    options |= {"eps": draw(st.sampled_from((1e-5, 0.1))), "frozen": draw(st.booleans())}
    if moments is None and draw(st.booleans()):
        options["residual_grad"] = source.map(samples, channels, height, width)
    options |= {"want_x": draw(st.booleans()), "want_weight": draw(st.booleans())}
    return Call((x, source.values(channels, 1, kernel, kernel)), options)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(call=forward_cases())
def test_forward_agrees_with_float64(backend: str, call: Call) -> None:
    called = call.fresh()
    y, statistics = called(op.forward, backend=backend)
    cases.compare(("y",), (y,), reference.depthwise, call)
    if call.options["want_statistics"]:
        norm_cases.check_statistics(statistics, y, call.options, called.options)
    else:
        assert statistics.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(call=backward_cases())
def test_backward_agrees_with_float64(backend: str, call: Call) -> None:
    gradients = call(op.backward, backend=backend)
    cases.compare(("grad_x", "grad_weight", "coefficients"), gradients, reference.depthwise_backward, call)


def padded_as_by_tensorflow(x: Tensor, weight: Tensor, stride: int, bias: Tensor | None = None) -> Tensor:
    kernel, around = weight.shape[-1], []
    for size in (x.shape[-1], x.shape[-2]):  # `F.pad` begins with the last
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        around += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, around), weight, bias, stride, groups=weight.shape[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_same_padding_is_that_of_tensorflow(backend: str, stride: int, data: st.DataObject) -> None:
    """Of values so few bits wide that float32 is exact. With an affine, other kernels compute than without."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype, kernel = data.draw(st.sampled_from((torch.float32, torch.float64))), data.draw(st.sampled_from((3, 5, 7)))
    sizes = st.sampled_from((1, 2, 3, 4, 15, 16, 30))
    channels, height, width = data.draw(st.sampled_from((3, 16, 40))), data.draw(sizes), data.draw(sizes)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).double()

    u = drawn(2, channels, height, width).requires_grad_()
    weight = drawn(channels, 1, kernel, kernel).requires_grad_()
    y = padded_as_by_tensorflow(u, weight, stride)
    grad = drawn(*y.shape)
    expected = (y, *torch.autograd.grad(y, (u, weight), grad))

    affine = torch.stack((torch.full((channels,), 0.5), torch.full((channels,), 0.25)))
    options: dict[str, Any] = {"stride": stride, "same_padding": True, "backend": backend}
    x = u.detach()
    if data.draw(st.booleans()):
        x, options["affine"] = (x - 0.25) * 2, affine.to(dtype)
    x, grad, taps = maps.channels_last(x.to(dtype)), maps.channels_last(grad.to(dtype)), weight.detach().to(dtype)
    found = (op.forward(x, taps, **options)[0], *op.backward(x, taps, grad=grad, **options)[:2])
    for name, mine, exact in zip(("y", "grad_x", "grad_weight"), found, expected, strict=True):
        assert torch.equal(mine.double(), exact), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(5, 8), (6, 6), (7, 1)])
def test_the_function_pads_as_tensorflow_does(backend: str, size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((2, 16, *size), (16, 1, 5, 5), (16,)))
    for stride in (1, 2):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        wide = [t.double().requires_grad_() for t in (x, weight, bias)]
        y = functional.depthwise_conv2d(*leaves, stride, same_padding=True, backend=backend)
        expected = padded_as_by_tensorflow(wide[0], wide[1], stride, wide[2])
        grad = torch.randn(y.shape, generator=g)
        found = (y, *torch.autograd.grad(y, leaves, grad, create_graph=True))
        for mine, exact in zip(found, (expected, *torch.autograd.grad(expected, wide, grad.double())), strict=True):
            torch.testing.assert_close(mine, exact.float())
        image = functional.depthwise_conv2d(x[0], weight, bias, stride, same_padding=True, backend=backend)
        torch.testing.assert_close(image, expected[0].float())
    mapped = torch.func.vmap(lambda x: functional.depthwise_conv2d(x, weight, None, 2, same_padding=True))
    torch.testing.assert_close(mapped(x), padded_as_by_tensorflow(x, weight, 2))


def test_a_graph_with_same_padding_holds_for_odd_and_even_sizes() -> None:
    weight = torch.randn(4, 1, 3, 3)
    traced = torch.fx.symbolic_trace(lambda x: functional.depthwise_conv2d(x, weight, None, 2, same_padding=True))
    for size in ((6, 9), (9, 6), (1, 2)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(traced(x), padded_as_by_tensorflow(x, weight, 2))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_channels_than_one_group_of_threads_takes(backend: str, stride: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 200, 6, 5, generator=g).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(200, 1, 3, 3, generator=g)
    forward = Call((x, weight), {"stride": stride, "want_statistics": True})
    y, statistics = forward(op.forward, backend=backend)
    cases.compare(("y",), (y,), reference.depthwise, forward)
    norm_cases.check_statistics(statistics, y, forward.options, forward.options)
    grad = torch.randn(y.shape, generator=g).contiguous(memory_format=torch.channels_last)
    backward = Call((x, weight), {"grad": grad, "stride": stride})
    gradients = backward(op.backward, backend=backend)
    cases.compare(("grad_x", "grad_weight", "coefficients"), gradients, reference.depthwise_backward, backward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_no_samples_of_many_wide_channels(backend: str) -> None:
    """The weights of as many channels as a block works on do not fit into shared memory."""
    x, weight = maps.channels_last(torch.zeros(0, 128, 4, 3, dtype=torch.float64)), torch.zeros(128, 1, 7, 7).double()
    y, statistics = op.forward(x, weight, want_statistics=True, backend=backend)
    assert y.shape == x.shape
    assert statistics.shape == (4, 128)
    grad_x, grad_weight, _ = op.backward(x, weight, grad=y, backend=backend)
    assert grad_x.shape == x.shape
    assert not grad_weight.any()


@st.composite
def one_of_each(draw: st.DrawFn) -> tuple[Call, Call]:
    return draw(forward_cases()), draw(backward_cases())


@settings(max_examples=10, deadline=None)
@given(both=one_of_each())
def test_bits_do_not_depend_on_threads_or_runs(both: tuple[Call, Call]) -> None:
    def run() -> tuple[Tensor, ...]:
        of_forward, of_backward = both[0].fresh(), both[1]
        return *of_forward(op.forward, backend="cpu"), *of_backward(op.backward, backend="cpu")

    once = cases.with_threads(1, run)
    cases.assert_same(once, cases.with_threads(2, run))
    cases.assert_same(once, run())


LARGE = """
from biasloss_ext.ops.depthwise import op
g = torch.Generator().manual_seed(0)
normal = lambda *s: torch.randn(s, generator=g)
last = lambda t: t.contiguous(memory_format=torch.channels_last)
outputs = []
for kernel, stride, same in ((3, 1, False), (5, 2, False), (7, 1, False), (7, 2, False), (5, 2, True)):
    x, weight, affine = last(normal(2, 200, 29 + same, 31 + same)), normal(200, 1, kernel, kernel), normal(2, 200)
    before = {"affine": affine, "activation": 2, "stride": stride, "same_padding": same, "backend": "cpu"}
    y, statistics = op.forward(x, weight, **before, want_statistics=True)
    after = {"grad": last(normal(*y.shape)), "y": y, "y_affine": normal(2, 200), "y_coefficients": normal(6, 200)}
    moments = torch.stack((normal(200), normal(200).square() + 0.5))
    gradients = op.backward(x, weight, **before, **after, y_activation=3, moments=moments)
    outputs += [y, *statistics, *gradients[:2], *gradients[2]]
"""


def test_large_maps_are_cut_the_same_for_any_number_of_threads() -> None:
    def run() -> list[Tensor]:
        scope: dict[str, Any] = {"torch": torch}
        exec(LARGE, scope)
        return scope["outputs"]

    cases.assert_same(cases.with_threads(1, run), cases.with_threads(2, run))


def test_instruction_sets_agree(tmp_path: Path) -> None:
    best, *others = [cases.outputs_with(name, LARGE, tmp_path) for name in (variant_in_use(), *other_variants())]
    for other in others:
        for a, b in zip(best, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 * float(a.abs().max()))


def test_moments_of_a_mean_far_above_the_spread() -> None:
    x = maps.channels_last(torch.randn(4, 40, 23, 17, generator=torch.Generator().manual_seed(0)) + 1000)
    weight = torch.zeros(40, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    y, statistics = op.forward(x, weight, want_statistics=True, backend="cpu")
    assert torch.equal(y, x)
    torch.testing.assert_close(statistics[1].double(), maps.moments_of(x.double())[1], rtol=4e-6, atol=0)


@pytest.mark.parametrize(
    ("at", "options", "message"),
    [
        ({0: torch.randn(2, 20, 9, 6)}, {}, "x: expected a dense channels_last map"),
        ({1: torch.randn(20, 1, 4, 4)}, {}, "expected a kernel of 3, 5 or 7, got 4"),
        ({1: torch.randn(19, 1, 3, 3)}, {}, "weight: expected"),
        ({}, {"affine": torch.randn(2, 19)}, "affine: expected 40"),
        ({}, {"stride": 3}, "stride: expected 1 or 2, got 3"),
    ],
)
def test_what_the_kernels_cannot_take_is_an_error(at: dict[int, Tensor], options: dict[str, Any], message: str) -> None:
    x = maps.channels_last(torch.randn(2, 20, 9, 6))
    given_ = {"affine": torch.randn(2, 20), "activation": maps.RELU6, "stride": 2, "want_statistics": True}
    call = Call((x, torch.randn(20, 1, 5, 5)), given_).but(at, **options)
    with pytest.raises(RuntimeError, match=message):
        call(op.forward, backend="cpu")
