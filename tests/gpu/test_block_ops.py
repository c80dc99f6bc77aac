"""The Triton ops of the blocks on SkipblockNet-M's shapes: against float64, repeatability, capture in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from biasloss_ext.ops import maps
from biasloss_ext.ops.registry import OPS
from tests.calls import Call
from tests.gpu.gpu_inputs import (
    assert_close_to_float64,
    assert_replays_on_new_values,
    drawn,
    run,
    skip_unless_it_runs,
    within,
)

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# (in, out, size, gated) of the network's 1x1 convolutions
SHAPES = (
    (16, 16, 112, False),
    (16, 64, 112, False),
    (64, 24, 56, False),
    (24, 72, 56, False),
    (72, 24, 56, False),
    (72, 40, 28, True),
    (40, 240, 28, False),
    (240, 40, 28, True),
    (80, 184, 14, False),
    (200, 80, 14, False),
    (112, 672, 14, False),
    (672, 160, 7, True),
    (160, 960, 7, False),
)
SAMPLES = 4
Calls = dict[str, list[Call]]


@pytest.fixture(autouse=True)
def triton(device: torch.device) -> None:
    skip_unless_it_runs("triton", "pointwise", device)


def norm_of(channels: int, draw: Any) -> dict[str, Any]:
    return {
        "norm_weight": 1 + 0.2 * draw(channels),
        "norm_bias": draw(channels),
        "running_mean": draw(channels),
        "running_var": draw(channels).square() + 0.1,
    }


def calls(inputs: int, outputs: int, size: int, gated: bool, dtype: torch.dtype, device: torch.device) -> Calls:
    """Every op of a block."""
    inputs, outputs, size = within(40)(inputs), within(40)(outputs), within(10)(size)
    draw = drawn(device, dtype)
    x, x_like = (draw(SAMPLES, inputs, size, size) for _ in range(2))
    y, grad = (draw(SAMPLES, outputs, size, size) for _ in range(2))
    weight = (draw(outputs, inputs) / inputs**0.5)[:, :, None, None]
    statistics = maps.statistics_of(x, norm_weight=1 + 0.2 * draw(inputs), norm_bias=draw(inputs))
    moments, affine = statistics[:2].contiguous(), statistics[2:].contiguous()
    gate = draw(SAMPLES, inputs) if gated else None
    act = {"activation": maps.HARDSWISH}
    before: dict[str, Any] = {"affine": affine, **act}
    behind = {"y": y, "y_coefficients": draw(6, outputs)}
    return {
        "pointwise": [
            Call((x, weight), {**before, "gate": gate, "want_statistics": True, **norm_of(outputs, draw)}),
            Call((x, weight), {"bias": draw(outputs), "output_activation": maps.RELU, "residual": y}),
        ],
        "pointwise_backward": [
            Call((grad, x, weight), {**before, **behind, "moments": moments, "gate": gate, "residual_grad": x_like}),
            Call((grad, x, weight)),
        ],
        "batch_norm_statistics": [Call((x,), norm_of(inputs, draw))],
        "batch_norm_apply": [Call((x, affine), {**act, "residual": x_like})],
        "batch_norm_coefficients": [Call((x_like, x, affine, moments), act)],
        "batch_norm_backward": [Call((x_like, x, affine, draw(6, inputs)), act)],
        "pool_variance": [Call((x,), {**before, "want_variance": True})],
        "pool_variance_backward": [Call((draw(SAMPLES, inputs), x), {**before, "moments": moments})],
    }


def gate_calls(channels: int, reduced: int, device: torch.device) -> Calls:
    samples, channels, reduced = within(10)(256), within(80)(channels), within(30)(reduced)
    draw = drawn(device, F32)
    pooled, gate_grad, expanded = (draw(samples, channels) for _ in range(3))
    reduce_weight, expand_weight = draw(reduced, channels) / channels**0.5, draw(channels, reduced) / reduced**0.5
    options: dict[str, Any] = {"activation": maps.RELU, "gate_activation": maps.HARDSIGMOID}
    finish = {"sums": draw(4, samples, channels), "affine": draw(2, channels), "positions": 49}
    finish["moments"] = torch.stack((draw(channels), draw(channels).square() + 0.5))
    saved = (gate_grad, pooled, draw(samples, reduced), expanded, reduce_weight, expand_weight)
    return {
        "squeeze_excite": [Call((pooled, reduce_weight, draw(reduced), expand_weight, draw(channels)), options)],
        "squeeze_excite_backward": [Call(saved, {**options, **finish}), Call(saved, options)],
    }


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize(("inputs", "outputs", "size", "gated"), SHAPES)
def test_against_float64(
    inputs: int, outputs: int, size: int, gated: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == F64 and inputs * outputs > 10000:
        pytest.skip("float64 products of this width are correct by the narrow ones, and slow")
    for name, of_op in calls(inputs, outputs, size, gated, dtype, device).items():
        for call in of_op:
            assert_close_to_float64(OPS[name], call, dtype, "triton")


@pytest.mark.parametrize(("channels", "reduced"), [(72, 24), (240, 64), (672, 168), (960, 240)])
def test_gate_against_float64(channels: int, reduced: int, device: torch.device) -> None:
    for name, of_op in gate_calls(channels, reduced, device).items():
        for call in of_op:
            assert_close_to_float64(OPS[name], call, F32, "triton")


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_repeats_to_the_bit(dtype: torch.dtype, device: torch.device) -> None:
    for name, of_op in {**calls(72, 40, 28, True, dtype, device), **gate_calls(240, 64, device)}.items():
        for call in of_op:
            first = run(OPS[name], call, "triton")
            for _ in range(3):
                assert all(map(torch.equal, run(OPS[name], call, "triton"), first))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_captured_in_a_graph(dtype: torch.dtype, gpu: torch.device) -> None:
    for of_ops in (calls(64, 24, 56, False, dtype, gpu), calls(72, 40, 28, True, dtype, gpu), gate_calls(240, 64, gpu)):
        for name, of_op in of_ops.items():
            for call in of_op:
                assert_replays_on_new_values(OPS[name], call, "triton")
