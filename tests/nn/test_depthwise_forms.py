"""Depthwise convolutions that are put together from those that kernels compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biasloss_ext import accelerate, optimize_for_inference
from biasloss_ext.nn.depthwise_forms import LargeDepthwiseConv2d, MultipliedDepthwiseConv2d
from biasloss_ext.report import DEPTHWISE
from tests.dispatched import dispatched

CHANNELS = 6
MULTIPLIED: tuple[dict[str, Any], ...] = (
    {"out_channels": 12, "kernel_size": 3, "padding": 1},
    {"out_channels": 18, "kernel_size": 5, "padding": 2, "stride": 2, "bias": False},
    {"out_channels": 12, "kernel_size": 7, "padding": 3, "stride": 2},
    {"out_channels": 12, "kernel_size": 3, "padding": "same"},
    {"out_channels": 12, "kernel_size": 1, "stride": 2},
)
LARGE: tuple[dict[str, Any], ...] = (
    {"out_channels": CHANNELS, "kernel_size": 9, "padding": 4},
    {"out_channels": CHANNELS, "kernel_size": 11, "padding": "same", "bias": False},
    {"out_channels": CHANNELS, "kernel_size": 13, "padding": 6},
)


def network(options: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(CHANNELS, groups=CHANNELS, **options)
    norm = nn.BatchNorm2d(convolution.out_channels)
    return nn.Sequential(
        nn.Sequential(convolution, norm, nn.ReLU()), nn.Conv2d(convolution.out_channels, 4, 1, bias=False)
    )


def images(size: tuple[int, int] = (15, 12)) -> Tensor:
    return torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(15, 12), (4, 3)])
@pytest.mark.parametrize("options", [*MULTIPLIED, *LARGE])
def test_results_are_the_plain_convolutions(
    options: dict[str, Any], size: tuple[int, int], layout: torch.memory_format
) -> None:
    plain = network(options).double()
    model = copy.deepcopy(plain)
    report = accelerate(model)
    form = MultipliedDepthwiseConv2d if options in MULTIPLIED else LargeDepthwiseConv2d
    assert type(model.get_submodule("0.0")) is form
    assert report.count(DEPTHWISE) == (int(form is MultipliedDepthwiseConv2d), 1)
    assert dispatched(copy.deepcopy(model), images())[DEPTHWISE] == int(form is LargeDepthwiseConv2d)
    for small, smaller in ((plain, model), (plain.eval(), model.eval())):
        x = images(size).contiguous(memory_format=layout)
        for ours, truth in zip(results(smaller[0], x), results(small[0], x), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(optimize_for_inference(model)(images()), plain(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [MULTIPLIED[1], LARGE[0]])
def test_float32_errors_and_strides(options: dict[str, Any]) -> None:
    """Within twice those of PyTorch."""
    plain = network(options)[0][0]  # type: ignore[index]
    model = nn.Sequential(copy.deepcopy(plain))
    accelerate(model)
    x = images((33, 30))
    truths = results(copy.deepcopy(plain).double(), x)
    for ours, own, truth in zip(results(model, x.float()), results(plain, x.float()), truths, strict=True):
        error = (ours.double() - truth).abs().max()
        assert error <= 2 * (own.double() - truth).abs().max() + 1e-6 * truth.abs().max()
    for gradient, parameter in zip(results(model, x.float())[2:], plain.parameters(), strict=True):
        assert gradient.stride() == parameter.stride()


@pytest.mark.parametrize("options", [MULTIPLIED[1], MULTIPLIED[4], LARGE[0]])
def test_second_derivatives_and_autocast(options: dict[str, Any]) -> None:
    plain = network(options)[0][0].double()  # type: ignore[index, operator]
    model = nn.Sequential(copy.deepcopy(plain))
    accelerate(model)
    x = images((3, 2)).requires_grad_()
    assert torch.autograd.gradgradcheck(model, (x,), fast_mode=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (each.float()(x.detach().float()) for each in (model, plain))
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    graph = torch.fx.symbolic_trace(model.double())
    torch.testing.assert_close(graph(x), plain.double()(x))


@pytest.mark.parametrize("options", [MULTIPLIED[1], LARGE[0]])
def test_compiled_steps(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(network(options)[0][0])  # type: ignore[index]
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images((5, 4)).float()
    for traced, eager in zip(results(compiled, x), results(model, x), strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    "change", [{"kernel_size": 9, "padding": 3}, {"kernel_size": 9, "padding": 4, "stride": 2}, {"kernel_size": (9, 1)}]
)
def test_other_convolutions_stay(change: dict[str, Any]) -> None:
    model = network({"out_channels": CHANNELS, **change})
    accelerate(model)
    assert type(model.get_submodule("0.0")) is nn.Conv2d
