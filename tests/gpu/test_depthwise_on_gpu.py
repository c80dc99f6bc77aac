"""The CUDA depthwise kernels on the shapes of SkipblockNet-M, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from biasloss_ext.ops import maps
from biasloss_ext.ops.depthwise import op
from tests.calls import Call
from tests.gpu.gpu_inputs import (
    assert_close_to_float64,
    assert_replays_on_new_values,
    drawn,
    run,
    skip_unless_it_runs,
    some,
    within,
)

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


@pytest.fixture(autouse=True)
def cuda(device: torch.device) -> None:
    skip_unless_it_runs("cuda", "depthwise", device)


def calls(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, samples: int = within(2)(4)
) -> tuple[Call, Call]:
    """Of the forward and of the backward op."""
    channels, size, kernel, stride = shape
    draw = drawn(device, dtype)
    x, weight = draw(samples, channels, size, size), draw(channels, kernel * kernel).view(channels, 1, kernel, kernel)
    out = (samples, channels, op.output_size(size, stride), op.output_size(size, stride))
    before: dict[str, Any] = {"affine": draw(2, channels), "activation": maps.HARDSWISH, "stride": stride}
    moments = torch.stack((draw(channels), draw(channels).square() + 0.5))
    after = {"grad": draw(*out), "pool_grad": draw(samples, channels), "y": draw(*out), "y_affine": draw(2, channels)}
    after |= {"y_coefficients": draw(6, channels)}
    return (
        Call((x, weight), {**before, "want_statistics": True, "norm_bias": draw(channels)}),
        Call((x, weight), {**before, **after, "y_activation": maps.RELU, "moments": moments}),
    )


def run_both(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, samples: int) -> list[Any]:
    forward, backward = calls(shape, dtype, device, samples)
    return [*run(op.forward, forward, "cuda"), *run(op.backward, backward, "cuda")]


@pytest.mark.parametrize("shape", some(SHAPES, 5), ids=str)
@pytest.mark.parametrize("dtype", some(DTYPES, 2), ids=str)
def test_shapes_of_the_network(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    channels, size, *rest = shape
    forward, backward = calls((within(20)(channels), within(9)(size), *rest), dtype, device)  # type: ignore[arg-type]
    assert_close_to_float64(op.forward, forward, dtype, "cuda")
    assert_close_to_float64(op.backward, backward, dtype, "cuda")


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", some([1, 13, 24], 2))
def test_odd_sizes(kernel: int, stride: int, channels: int, device: torch.device) -> None:
    """Channels that are no multiple of a vector, maps smaller than the kernel."""
    for size in (1, 2, 9, within(15)(33)):
        forward, backward = calls((channels, size, kernel, stride), torch.float32, device, samples=3)
        assert_close_to_float64(op.forward, forward, torch.float32, "cuda")
        assert_close_to_float64(op.backward, backward, torch.float32, "cuda")


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[14]], ids=str)
def test_the_same_bits_from_run_to_run(shape: tuple[int, int, int, int], device: torch.device) -> None:
    shape = (within(24)(shape[0]), within(14)(shape[1]), *shape[2:])
    first = run_both(shape, torch.bfloat16, device, within(4)(32))
    for _ in range(within(2)(5)):
        assert all(map(torch.equal, run_both(shape, torch.bfloat16, device, within(4)(32)), first))


def test_a_cuda_graph_replays_on_new_values(gpu: torch.device) -> None:
    forward, backward = calls((72, 56, 3, 1), torch.bfloat16, gpu)
    assert_replays_on_new_values(op.forward, forward, "cuda")
    assert_replays_on_new_values(op.backward, backward, "cuda")


def test_no_samples(device: torch.device) -> None:
    y, statistics, grad_x, grad_weight, coefficients = run_both((16, 8, 3, 1), torch.float32, device, 0)
    assert y.shape == grad_x.shape == (0, 16, 8, 8)
    assert not statistics[:2].any() and not grad_weight.any() and not coefficients[4:].any()


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    forward, _ = calls((16, 8, 3, 1), torch.float32, device)
    x, weight = forward.arguments
    for bad, message in (
        (forward.but({0: x.contiguous()}), "channels_last"),
        (forward.but({1: weight[:8]}), "expected a weight of shape"),
        (forward.but(stride=3), "expected a stride of 1 or 2"),
        (forward.but(affine=None), "expected activation 0"),
        (forward.but(affine=forward.options["affine"][:1]), "expected 32 contiguous values"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bad(op.forward, backend="cuda")
