"""The CUDA depthwise kernels on a GPU, on the shapes of SkipblockNet-M, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.backends import why_not
from biasloss_ext.ops.depthwise import op, reference
from biasloss_ext.ops.library import accumulation_dtype

REASON = "torch finds no CUDA GPU"
if torch.cuda.is_available():
    REASON = why_not("cuda", torch.device("cuda", 0), "depthwise") or ""
pytestmark = pytest.mark.skipif(REASON != "", reason=f"the CUDA kernels cannot run here: {REASON}")

# Channels, height and width, kernel, stride of every depthwise convolution of SkipblockNet-M at 224.
SHAPES = [
    (16, 112, 3, 1),
    (40, 14, 3, 1),
    (64, 112, 3, 2),
    (72, 56, 3, 1),
    (72, 56, 5, 2),
    (96, 28, 5, 1),
    (120, 28, 5, 1),
    (184, 14, 3, 1),
    (200, 14, 3, 1),
    (240, 28, 3, 2),
    (240, 28, 5, 1),
    (480, 14, 3, 1),
    (672, 14, 3, 1),
    (672, 14, 5, 2),
    (960, 7, 5, 1),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def make_arguments(
    shape: tuple[int, int, int, int], dtype: torch.dtype, samples: int = 4
) -> tuple[list[Any], list[Any]]:
    """Of the forward and of the backward op, on the GPU."""
    channels, size, kernel, stride = shape
    generator = torch.Generator().manual_seed(sum(shape))
    wide = accumulation_dtype(dtype)

    def values(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to("cuda", wide)

    def feature_map(side: int) -> Tensor:
        return maps.channels_last(values(samples, channels, side, side).to(dtype))

    x, weight, affine = feature_map(size), values(channels, 1, kernel, kernel), values(2, channels)
    out = op.output_size(size, stride)
    forward = [x, weight, affine, maps.HARDSWISH, stride, True]
    before = [feature_map(out), values(samples, channels), feature_map(out), values(2, channels), values(4, channels)]
    after = [values(channels), maps.HARDSWISH, stride, True, True]
    return forward, [*before, maps.RELU, x, weight, affine, *after]


def wider(arguments: list[Any], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) else a for a in arguments]


def assert_near(got: Tensor, want: Tensor, plain: Tensor) -> None:
    """Four times the error of torch's own, and the rounding of what is stored."""
    accumulation = torch.finfo(accumulation_dtype(got.dtype)).eps
    stored = torch.finfo(got.dtype).eps / 2 if got.element_size() == 2 else 0.0
    error = (got.double() - want).abs()
    allowed = stored * 1.01 * want.abs() + 4 * (plain.double() - want).abs().max()
    allowed = allowed + 8 * accumulation * want.abs().max()
    assert bool((error <= allowed).all()), f"error {float(error.max())}, allowed there {float(allowed.max())}"


def run_forward(arguments: list[Any]) -> tuple[Tensor, Tensor]:
    y, moments = op.forward(*arguments, device=arguments[0].device, backend="cuda")
    return y, moments


def run_backward(arguments: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, sums = op.backward(*arguments, device=arguments[6].device, backend="cuda")
    return grad_x, grad_weight, sums


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_of_the_network(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    forward, backward = make_arguments(shape, dtype)
    wide = accumulation_dtype(dtype)
    y, moments = run_forward(forward)
    assert_near(
        y, reference.depthwise(*wider(forward, torch.float64))[0], reference.depthwise(*wider(forward, wide))[0]
    )
    assert_near(moments, maps.moments_of(y.double()), maps.moments_of(y.to(wide)))
    want = reference.depthwise_backward(*wider(backward, torch.float64))
    plain = reference.depthwise_backward(*wider(backward, wide))
    for result, exact, rounded in zip(run_backward(backward), want, plain, strict=True):
        assert_near(result, exact, rounded)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 13, 24])
def test_odd_sizes(kernel: int, stride: int, channels: int) -> None:
    """Channels that are no multiple of a vector, maps smaller than the kernel."""
    for size in (1, 2, 9, 33):
        forward, backward = make_arguments((channels, size, kernel, stride), torch.float32, samples=3)
        y, _ = run_forward(forward)
        want = reference.depthwise(*wider(forward, torch.float64))[0]
        assert_near(y, want, reference.depthwise(*forward)[0])
        exact = reference.depthwise_backward(*wider(backward, torch.float64))
        plain = reference.depthwise_backward(*backward)
        for result, right, rounded in zip(run_backward(backward), exact, plain, strict=True):
            assert_near(result, right, rounded)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[14]], ids=str)
def test_the_same_bits_from_run_to_run(shape: tuple[int, int, int, int]) -> None:
    forward, backward = make_arguments(shape, torch.bfloat16, samples=32)
    first = [*run_forward(forward), *run_backward(backward)]
    for _ in range(5):
        for got, want in zip([*run_forward(forward), *run_backward(backward)], first, strict=True):
            assert torch.equal(got, want)


def test_a_cuda_graph_replays_on_new_values() -> None:
    forward, backward = make_arguments((72, 56, 3, 1), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_forward(forward)
        run_backward(backward)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [*run_forward(forward), *run_backward(backward)]
    forward[0].mul_(-0.5)  # the x of both
    graph.replay()
    for got, want in zip(captured, [*run_forward(forward), *run_backward(backward)], strict=True):
        assert torch.equal(got, want)


def test_no_samples() -> None:
    forward, backward = make_arguments((16, 8, 3, 1), torch.float32, samples=0)
    y, moments = run_forward(forward)
    assert y.shape == (0, 16, 8, 8) and not moments.any()
    grad_x, grad_weight, sums = run_backward(backward)
    assert grad_x.shape == (0, 16, 8, 8) and not grad_weight.any() and not sums.any()


def test_what_does_not_fit_is_refused() -> None:
    (x, weight, affine, activation, stride, _), _ = make_arguments((16, 8, 3, 1), torch.float32)
    for bad, message in (
        ([x.contiguous(), weight, affine, activation, stride], "channels_last"),
        ([x, weight[:8], affine, activation, stride], "expected a weight of shape"),
        ([x, weight, affine, activation, 3], "expected a stride of 1 or 2"),
        ([x, weight, None, activation, stride], "expected the identity"),
        ([x, weight, affine[:1], activation, stride], "expected 32 contiguous values"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_forward([*bad, True])
