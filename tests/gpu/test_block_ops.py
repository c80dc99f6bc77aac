"""The Triton ops of the blocks on a GPU: SkipblockNet-M's shapes against float64, repeatability, capture in CUDA graphs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from biasloss_ext.ops import maps, triton_backend
from biasloss_ext.ops.batch_norm import op as batch_norm
from biasloss_ext.ops.dispatch import Op
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool
from biasloss_ext.ops.squeeze_excite import op as squeeze_excite

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
UNIT_ROUNDOFF = {F16: 2**-11, BF16: 2**-8, F32: 2**-24, F64: 2**-53}
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


def drawn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    dtype = F32 if len(shape) < 4 and dtype != F64 else dtype
    x = torch.randn(shape, device="cuda", dtype=F64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def weight_of(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return drawn(outputs, inputs, dtype=F64 if dtype == F64 else F32)[:, :, None, None] / inputs**0.5


def calls(inputs: int, outputs: int, size: int, gated: bool, dtype: torch.dtype) -> list[tuple[Op, tuple[Any, ...]]]:
    """Every op of a block, once."""
    torch.manual_seed(0)
    x, x_like = (drawn(SAMPLES, inputs, size, size, dtype=dtype) for _ in range(2))
    y, grad = (drawn(SAMPLES, outputs, size, size, dtype=dtype) for _ in range(2))
    accumulated = F64 if dtype == F64 else F32
    weight, affine = weight_of(outputs, inputs, dtype), drawn(2, inputs, dtype=accumulated)
    center, coefficients = drawn(inputs, dtype=accumulated), drawn(4, outputs, dtype=accumulated)
    at_x = drawn(4, inputs, dtype=accumulated)
    gate = drawn(SAMPLES, inputs, dtype=accumulated) if gated else None
    bias, pool_grad = drawn(outputs, dtype=accumulated), drawn(SAMPLES, inputs, dtype=accumulated)
    act = maps.HARDSWISH
    return [
        (pointwise.forward, (x, weight, affine, act, gate, None, maps.IDENTITY, None, True)),
        (pointwise.forward, (x, weight, None, maps.IDENTITY, None, bias, maps.RELU, y, False)),
        (
            pointwise.backward,
            (grad, y, coefficients, x, weight, affine, center, act, gate, x_like, True, True),
        ),
        (pointwise.backward, (grad, None, None, x, weight, None, None, maps.IDENTITY, None, None, True, True)),
        (batch_norm.moments, (x,)),
        (batch_norm.apply, (x, affine, act, x_like)),
        (batch_norm.sums, (x_like, x, affine, center, act)),
        (batch_norm.backward, (x_like, x, affine, at_x, act)),
        (pool.forward, (x, affine, act, True)),
        (pool.backward, (pool_grad, x, affine, center, act)),
    ]


def gate_calls(channels: int, reduced: int, samples: int = 256) -> list[tuple[Op, tuple[Any, ...]]]:
    torch.manual_seed(0)
    pooled, gate_grad, expanded = (drawn(samples, channels) for _ in range(3))
    hidden = drawn(samples, reduced)
    reduce_weight, expand_weight = drawn(reduced, channels) / channels**0.5, drawn(channels, reduced) / reduced**0.5
    acts = (maps.RELU, maps.HARDSIGMOID)
    return [
        (squeeze_excite.forward, (pooled, reduce_weight, drawn(reduced), expand_weight, drawn(channels), *acts)),
        (squeeze_excite.backward, (gate_grad, pooled, hidden, expanded, reduce_weight, expand_weight, *acts)),
    ]


def outputs_of(op: Op, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    triton_backend.register()
    assert op.triton is not None
    outputs = op.triton(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def in_float64(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) else argument


def assert_close_to_float64(op: Op, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    """float32: twice the error of torch's own float32, TF32 off. Narrower: a few roundings, relative to the largest element."""
    exact, own = op.reference(*map(in_float64, arguments)), op.reference(*arguments)
    exact, own = (t if isinstance(t, tuple) else (t,) for t in (exact, own))
    for output, expected, torchs in zip(outputs_of(op, arguments), exact, own, strict=True):
        assert output.shape == torchs.shape and output.dtype == torchs.dtype
        if output.numel():
            error, error_of_torch = ((t.double() - expected).abs().max().item() for t in (output, torchs))
            roundings = 5 if dtype in (F16, BF16) else 8
            bound = 2 * error_of_torch + roundings * UNIT_ROUNDOFF[dtype] * expected.abs().max().item()
            assert error <= bound, (op.native, error, error_of_torch)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes TF32 unless told otherwise; the reference's convolution must not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize(("inputs", "outputs", "size", "gated"), SHAPES)
def test_against_float64(inputs: int, outputs: int, size: int, gated: bool, dtype: torch.dtype) -> None:
    if dtype == F64 and inputs * outputs > 10000:
        pytest.skip("float64 products of this width are correct by the narrow ones, and slow")
    for op, arguments in calls(inputs, outputs, size, gated, dtype):
        assert_close_to_float64(op, arguments, dtype)


@pytest.mark.parametrize(("channels", "reduced"), [(72, 24), (240, 64), (672, 168), (960, 240)])
def test_gate_against_float64(channels: int, reduced: int) -> None:
    for op, arguments in gate_calls(channels, reduced):
        assert_close_to_float64(op, arguments, F32)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_repeats_to_the_bit(dtype: torch.dtype) -> None:
    for op, arguments in [*calls(72, 40, 28, True, dtype), *gate_calls(240, 64)]:
        first = outputs_of(op, arguments)
        for _ in range(3):
            assert all(map(torch.equal, outputs_of(op, arguments), first))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_captured_in_a_graph(dtype: torch.dtype) -> None:
    """Replays see new values at the old addresses; kernels are compiled before the capture."""
    for op, arguments in [*calls(64, 24, 56, False, dtype), *calls(72, 40, 28, True, dtype), *gate_calls(240, 64)]:
        outputs_of(op, arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs_of(op, arguments)
        next(a for a in arguments if isinstance(a, Tensor)).mul_(0.5)
        graph.replay()
        assert all(map(torch.equal, captured, outputs_of(op, arguments)))
