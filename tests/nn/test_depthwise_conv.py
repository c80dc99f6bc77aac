"""DepthwiseConv2d beside the nn.Conv2d that it stands in for."""

from __future__ import annotations

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


def with_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every second column":
        return torch.stack((x, torch.full_like(x, torch.nan)), 4).flatten(3)[..., ::2]
    return x


def plain_like(conv: DepthwiseConv2d, dtype: torch.dtype) -> nn.Conv2d:
    channels, kernel, bias = conv.in_channels, conv.kernel_size[0], conv.bias is not None
    plain = nn.Conv2d(channels, channels, kernel, conv.stride, kernel // 2, groups=channels, bias=bias).double()
    plain.load_state_dict(conv.state_dict())
    return plain.to(dtype)


def outputs_and_gradients(conv: nn.Conv2d, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = conv(leaf)
    return [y.detach(), *torch.autograd.grad(y, (leaf, *conv.parameters()), grad.to(y.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_agrees_with_conv2d(backend: str, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    kernel, stride = data.draw(st.sampled_from((3, 5, 7))), data.draw(st.integers(1, 2))
    dtype = data.draw(st.sampled_from(FLOATS))
    shape = [data.draw(st.sampled_from(values)) for values in ((1, 2, 0), (1, 7, 24, 40), (1, 2, 6, 11), (1, 3, 9, 16))]
    x = torch.randn(shape, generator=generator) + data.draw(st.sampled_from((0.0, 100.0)))
    x = with_layout(x.to(dtype), data.draw(st.sampled_from(LAYOUTS)))
    conv = DepthwiseConv2d(shape[1], kernel, stride, bias=data.draw(st.booleans()), dtype=dtype, backend=backend)
    grad = torch.randn(plain_like(conv, torch.float64)(x.double()).shape, generator=generator).to(dtype)

    ours = outputs_and_gradients(conv, x, grad)
    truth = outputs_and_gradients(plain_like(conv, torch.float64), x.double(), grad.double())
    own = outputs_and_gradients(plain_like(conv, dtype), x, grad)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    largest = x.abs().double().max().item() if x.numel() > 0 else 0.0
    scales = (largest, 1.0, largest * grad.abs().double().sum((0, 2, 3)).max().item(), grad[:, 0].numel() * 4.0)
    for name, mine, exact, rough, scale in zip(
        ("y", "grad_x", "grad_weight", "grad_bias"), ours, truth, own, scales, strict=False
    ):
        assert mine.dtype == dtype, name
        narrow = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        oracle.assert_as_close_as_torch(mine, exact, rough, scale * narrow / torch.finfo(dtype).eps, name)


def test_is_a_drop_in() -> None:
    torch.manual_seed(0)
    ours = DepthwiseConv2d(8, 5, 2, bias=True)
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 5, 2, 2, groups=8)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    x = torch.randn(8, 9, 7)
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_first_and_second_derivatives(stride: int) -> None:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.depthwise_conv2d(x, weight, bias, stride, backend="cpu")

    shapes = ((2, 3, 5, 4), (3, 1, 3, 3), (3,))
    operands = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(convolve, operands)
    assert torch.autograd.gradgradcheck(convolve, operands)


def test_gradients_that_are_not_wanted_are_not_made() -> None:
    conv = DepthwiseConv2d(8, 3, backend="cpu").requires_grad_(False)
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    conv, x = DepthwiseConv2d(8, 3, bias=True, backend="cpu"), torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = conv(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert conv.weight.grad is not None and conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), conv(x), rtol=2e-2, atol=2e-2)


def test_compiles_without_breaks_and_exports() -> None:
    conv, x = DepthwiseConv2d(8, 3, 2, bias=True, backend="cpu"), torch.randn(2, 8, 6, 6)
    eager = outputs_and_gradients(conv, x, torch.ones(2, 8, 3, 3))
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(outputs_and_gradients(compiled, x, torch.ones(2, 8, 3, 3)), eager, strict=True):
        torch.testing.assert_close(ours, theirs)
    exported = torch.export.export(conv, (x,))
    torch.testing.assert_close(exported.module()(x), eager[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, r"kernel_size must be one of \(3, 5, 7\) in both directions, got 4"),
        ({"kernel_size": (3, 5)}, r"kernel_size must be .* got \(3, 5\)"),
        ({"kernel_size": 3, "stride": 3}, r"stride must be one of \(1, 2\) in both directions, got 3"),
    ],
)
def test_sizes_without_a_kernel_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthwiseConv2d(8, **arguments)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("dilation", (2, 2), r"dilation must be 1, got \(2, 2\)"),
        ("padding", (0, 0), r"padding must be 1 for a kernel of 3, got \(0, 0\)"),
        ("padding_mode", "circular", "padding_mode must be 'zeros', got 'circular'"),
    ],
)
def test_a_changed_module_is_an_error(attribute: str, value: Any, message: str) -> None:
    conv = DepthwiseConv2d(8, 3)
    setattr(conv, attribute, value)
    with pytest.raises(ValueError, match=message):
        conv(torch.randn(1, 8, 4, 4))


def test_inputs_of_another_kind_are_errors() -> None:
    conv = DepthwiseConv2d(8, 3)
    with pytest.raises(ValueError, match="x has 7 channels, weight has 8"):
        conv(torch.randn(1, 7, 4, 4))
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\) or \(C, H, W\), got \(8, 4\)"):
        conv(torch.randn(8, 4))
    with pytest.raises(TypeError, match="x must be float16"):
        conv(torch.ones(1, 8, 4, 4, dtype=torch.int64))
