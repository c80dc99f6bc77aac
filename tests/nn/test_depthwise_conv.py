"""DepthwiseConv2d beside the nn.Conv2d whose place it takes: values, gradients, memory formats."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from biasloss_ext import functional
from biasloss_ext.nn import DepthwiseConv2d
from tests import oracle
from tests.runnable import backends_of

BACKENDS = backends_of("depthwise")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "transposed", "every second column")
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((1, 2, 0), (1, 7, 24, 40), (1, 2, 6, 11), (1, 3, 9, 16))
Arguments = dict[str, Any]


def depthwise(channels: int, kernel: int, stride: int = 1, **options: Any) -> Arguments:
    """What the kernels compute."""
    sizes = {"in_channels": channels, "out_channels": channels, "groups": channels, "kernel_size": kernel}
    return {**sizes, "stride": stride, "padding": kernel // 2, **options}


@st.composite
def any_arguments(draw: st.DrawFn) -> Arguments:
    """Of nn.Conv2d, valid or not; often what the kernels compute but for one argument."""
    channels, kernel = draw(st.sampled_from((1, 4, 6))), draw(st.sampled_from((3, 5, 7)))
    pairs = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
    others = {
        "kernel_size": st.one_of(st.integers(1, 8), st.tuples(st.integers(1, 5), st.integers(1, 5))),
        "stride": pairs,
        "padding": st.one_of(pairs, st.sampled_from(("same", "valid", 0, "none of these"))),
        "dilation": pairs,
        "groups": st.sampled_from((1, 2, 3, 6)),
        "out_channels": st.sampled_from((2, 6, 12)),
        "padding_mode": st.sampled_from(("reflect", "replicate", "circular", "zeros", "none of these")),
        "bias": st.booleans(),
    }
    arguments = depthwise(channels, kernel, draw(st.integers(1, 2)))
    changed = draw(st.lists(st.sampled_from(sorted(others)), max_size=3, unique=True))
    return {**arguments, **{name: draw(others[name]) for name in changed}}


def with_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every second column":
        return torch.stack((x, torch.full_like(x, torch.nan)), 4).flatten(3)[..., ::2]
    return x


def plain_like(conv: DepthwiseConv2d, arguments: Arguments) -> nn.Conv2d:
    """The layer of PyTorch with the same parameters, in the same strides."""
    plain = nn.Conv2d(**arguments)
    plain.load_state_dict(conv.state_dict())
    return plain.to(memory_format=torch.channels_last) if conv.weight.stride() != plain.weight.stride() else plain


def outputs_and_gradients(conv: nn.Conv2d, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = conv(leaf)
    return [y.detach(), *torch.autograd.grad(y, (leaf, *conv.parameters()), grad.to(y.dtype))]


def assert_agrees(conv: DepthwiseConv2d, arguments: Arguments, x: Tensor, generator: torch.Generator) -> None:
    """With float64, within what PyTorch's own layer is off, in dtype and memory format of the latter."""
    plain = plain_like(conv, arguments)
    exact = copy.deepcopy(plain).double()
    grad = torch.randn(exact(x.double()).shape, generator=generator).to(x.dtype)
    ours = outputs_and_gradients(conv, x, grad)
    truth = outputs_and_gradients(exact, x.double(), grad.double())
    own = outputs_and_gradients(plain, x, grad)
    # Where sizes are 0 or 1 both formats hold, and the strides of PyTorch differ from dtype to dtype.
    if ours[0].dim() == 4 and ours[0].numel() > 0:
        for memory_format in FORMATS:
            assert ours[0].is_contiguous(memory_format=memory_format) == own[0].is_contiguous(
                memory_format=memory_format
            )
    largest = x.abs().double().max().item() if x.numel() > 0 else 0.0
    per_channel = grad.reshape(-1, *grad.shape[-3:]).abs().double().sum((0, 2, 3))
    scales = (largest, 1.0, largest * per_channel.max().item(), grad.numel() / max(grad.shape[-3], 1) * 4.0)
    narrow = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    for name, mine, correct, rough, scale in zip(
        ("y", "grad_x", "grad_weight", "grad_bias"), ours, truth, own, scales, strict=False
    ):
        assert mine.dtype == x.dtype, name
        assert mine.shape == correct.shape, name
        oracle.assert_as_close_as_torch(mine, correct, rough, scale * narrow / torch.finfo(x.dtype).eps, name)


def drawn_image(data: st.DataObject, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(tuple(shape), generator=generator) + data.draw(st.sampled_from((0.0, 100.0)))
    return with_layout(x.to(dtype), data.draw(st.sampled_from(LAYOUTS)))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_agrees_with_conv2d(backend: str, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype, shape = data.draw(st.sampled_from(FLOATS)), [data.draw(st.sampled_from(sizes)) for sizes in SHAPES]
    x = drawn_image(data, shape, dtype, generator)
    kernel, stride = data.draw(st.sampled_from((3, 5, 7))), data.draw(st.integers(1, 2))
    arguments = depthwise(shape[1], kernel, stride, bias=data.draw(st.booleans()), dtype=dtype)
    conv = DepthwiseConv2d(**arguments, backend=backend).to(memory_format=data.draw(st.sampled_from(FORMATS)))
    assert_agrees(conv, arguments, x, generator)
    gradients = outputs_and_gradients(conv, x, torch.ones_like(conv(x)))[2:]
    assert [g.stride() for g in gradients] == [p.stride() for p in conv.parameters()]


def raised(action: Any) -> type[Exception] | None:
    try:
        action()
    except Exception as error:
        return type(error)
    return None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_argument_of_conv2d_is_taken(data: st.DataObject) -> None:
    """What nn.Conv2d computes agrees; what it refuses is refused."""
    arguments = {**data.draw(any_arguments()), "dtype": data.draw(st.sampled_from(FLOATS))}
    refused = raised(lambda: nn.Conv2d(**arguments))
    assert raised(lambda: DepthwiseConv2d(**arguments)) is refused
    if refused is not None:
        return
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    sizes = [data.draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 6, 11), (1, 3, 9))]
    x = drawn_image(data, (sizes[0], arguments["in_channels"], *sizes[1:]), arguments["dtype"], generator)
    x = x[0] if data.draw(st.booleans()) else x
    conv = DepthwiseConv2d(**arguments).to(memory_format=data.draw(st.sampled_from(FORMATS)))
    plain = plain_like(conv, arguments)
    refused = raised(lambda: plain(x))
    if refused is not None:  # a kernel larger than the padded image; a dtype or padding that PyTorch lacks
        assert raised(lambda: conv(x)) is refused
        return
    assert_agrees(conv, arguments, x, generator)


@pytest.mark.parametrize("stride", [1, 2])
def test_first_and_second_derivatives(stride: int) -> None:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.depthwise_conv2d(x, weight, bias, stride, backend="cpu")

    shapes = ((2, 3, 5, 4), (3, 1, 3, 3), (3,))
    operands = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(convolve, operands)
    assert torch.autograd.gradgradcheck(convolve, operands)


def test_gradients_that_are_not_wanted_are_not_made() -> None:
    conv = DepthwiseConv2d(**depthwise(8, 3), backend="cpu").requires_grad_(False)
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None


@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, given: torch.dtype) -> None:
    """As in nn.Conv2d, inputs of every dtype but float64 are cast."""
    arguments = depthwise(8, 3)
    conv = DepthwiseConv2d(**arguments, backend="cpu")
    x = torch.randn(2, 8, 6, 6, dtype=given, requires_grad=True)
    with torch.autocast("cpu", dtype):
        if given == torch.float64:
            assert raised(lambda: plain_like(conv, arguments)(x)) is RuntimeError
            with pytest.raises(TypeError, match=r"x is torch\.float64, weight is torch\.float32: convert one"):
                conv(x)
            return
        y, expected = conv(x), plain_like(conv, arguments)(x)
    assert y.dtype == expected.dtype == dtype
    y.float().square().mean().backward()
    assert x.grad is not None and x.grad.dtype == given
    assert conv.weight.grad is not None and conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_compiles_without_breaks() -> None:
    conv, x = DepthwiseConv2d(**depthwise(8, 3, 2), backend="cpu"), torch.randn(2, 8, 6, 6)
    eager = outputs_and_gradients(conv, x, torch.ones(2, 8, 3, 3))
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(outputs_and_gradients(compiled, x, torch.ones(2, 8, 3, 3)), eager, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_results_of_contiguous_images_can_be_flattened() -> None:
    conv = DepthwiseConv2d(**depthwise(8, 3), backend="cpu")
    assert conv(torch.randn(2, 8, 6, 5)).view(2, -1).shape == (2, 240)
