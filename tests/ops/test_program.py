"""The layers of programs that are no ops of their own, and what programs refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.nn.program_code import packed_kernel
from biasloss_ext.ops import backends, maps
from biasloss_ext.ops.program.code import Instruction, Operation
from biasloss_ext.ops.program.vectors import by_outputs, by_vectors
from biasloss_ext.ops.registry import OPS

BACKENDS = [name for name in ("reference", "cpu") if backends.why_not(name, torch.device("cpu"), "program") is None]


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def run(x: Tensor, constants: list[Tensor], *rows: Instruction, backend: str = "cpu") -> Tensor:
    result: Tensor = OPS["program"](x, constants, [int(field) for row in rows for field in row], backend=backend)
    return result


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype, terms: int) -> None:
    bound = 2 * terms**0.5 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "padding"),
    [(3, 16, 3, 2, 1), (3, 8, 3, 1, 1), (1, 5, 5, 3, 4), (40, 33, 1, 2, 0), (4, 64, 7, 2, 3), (24, 40, 3, 1, 0)],
)
def test_dense_convolution(
    channels: int, outputs: int, kernel: int, stride: int, padding: int, dtype: torch.dtype, backend: str
) -> None:
    weight, bias = values(outputs, channels, kernel, kernel), values(outputs)
    row = Instruction(Operation.CONVOLUTION, 1, output_activation=maps.HARDSWISH, stride=stride, padding=padding)
    for size in ((1, 7, 7), (3, 19, 12)):
        x = values(size[0], channels, *size[1:])
        exact = F.hardswish(F.conv2d(x, weight, bias, stride, padding))
        constants = [packed_kernel(weight.to(dtype)), bias.to(dtype)]
        layouts = (x, x.contiguous(memory_format=torch.channels_last), F.pad(x, (2, 1, 0, 1))[:, :, :-1, 2:-1])
        results = [run(given.to(dtype), constants, row, backend=backend) for given in layouts]
        assert_close(results[0], exact, dtype, channels * kernel * kernel)
        assert all(torch.equal(result, results[0]) for result in results[1:]) or backend == "reference"
        assert results[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("samples", "channels", "outputs"), [(1, 960, 1280), (3, 5, 7), (17, 40, 33)])
def test_pooled_and_linear(samples: int, channels: int, outputs: int, dtype: torch.dtype, backend: str) -> None:
    x = values(samples, channels, 3, 2).contiguous(memory_format=torch.channels_last)
    weight, bias = values(outputs, channels) / channels**0.5, values(outputs)
    rows = (
        Instruction(Operation.POOL, 1),
        Instruction(Operation.RELEASE, input=0),
        Instruction(Operation.LINEAR, 2, input=1, output_activation=maps.SILU),
    )
    ours = run(x.to(dtype), [weight.to(dtype), bias.to(dtype)], *rows, backend=backend)
    assert_close(ours, F.silu(F.linear(x.mean((2, 3)), weight, bias)), dtype, channels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width", "stride"), [(8, 12, 2), (7, 9, 2), (1, 2, 2), (7, 5, 1)])
def test_average_to_the_size_of_another_map(
    height: int, width: int, stride: int, dtype: torch.dtype, backend: str
) -> None:
    for channels in (5, 16, 40):
        x = values(2, channels, height, width).contiguous(memory_format=torch.channels_last)
        rows = (
            Instruction(Operation.DEPTHWISE, 1, stride=stride),
            Instruction(Operation.AVERAGE, 2, input=0, other=1),
        )
        ours = run(x.to(dtype), [torch.ones(channels, 1, 3, 3, dtype=dtype)], *rows, backend=backend)
        size = (-(-height // stride), -(-width // stride))
        assert_close(ours, F.adaptive_avg_pool2d(x, size), dtype, height * width)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "outputs"), [(1, 5), (1, 24), (7, 16), (300, 40), (40, 33), (16, 200)])
def test_weights_by_vectors(channels: int, outputs: int, dtype: torch.dtype, backend: str) -> None:
    weight, bias = values(outputs, channels, 1, 1) / channels**0.5, values(outputs)
    packed = by_vectors(weight.to(dtype))
    assert packed.dim() == 3
    assert torch.equal(by_outputs(packed, outputs), weight.to(dtype))
    x = values(2, channels, 5, 6).contiguous(memory_format=torch.channels_last)
    row = Instruction(Operation.POINTWISE, 1, output_activation=maps.RELU)
    ours, same = (run(x.to(dtype), [form, bias.to(dtype)], row, backend=backend) for form in (packed, weight.to(dtype)))
    assert_close(ours, F.relu(F.conv2d(x, weight, bias)), dtype, channels)
    assert torch.equal(ours, same)

    taps = values(outputs, 1, 3, 3)
    affine = torch.stack((torch.ones(outputs), torch.zeros(outputs))).to(dtype)
    row = Instruction(Operation.EXPAND_DEPTHWISE, 1, activation=maps.RELU, stride=2)
    constants = [affine, taps.to(dtype), affine]
    ours, same = (run(x.to(dtype), [form, *constants], row, backend=backend) for form in (packed, weight.to(dtype)))
    exact = F.conv2d(F.relu(F.conv2d(x, weight)), taps, stride=2, padding=1, groups=outputs)
    assert_close(ours, exact, dtype, 9 * channels)
    assert torch.equal(ours, same)


ONE = torch.ones(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
REFUSED: dict[str, tuple[list[Tensor], list[int], str]] = {
    "no code": ([], [], "expected rows of 15 integers, got 0 integers"),
    "half a row": ([], [0] * 20, "expected rows of 15 integers, got 20 integers"),
    "an unknown operation": ([torch.ones(1)], list(Instruction(99, 1)), "expected an operation below 17, got 99"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REFUSED)
def test_code_that_is_none(case: str, backend: str) -> None:
    constants, code, message = REFUSED[case]
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS["program"](ONE, constants, code, backend=backend)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled kernels are not built")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Instruction(Operation.POOL, 2, input=1), "value 1 is read before it is computed"),
        (Instruction(Operation.POOL, -5), "output: expected the number of a value, got -5"),
        (Instruction(Operation.NORMALIZE, 1, constants=3), "constant 3 of 1"),
        (Instruction(Operation.NORMALIZE, 1, activation=42), "activation.*got 42"),
        (
            Instruction(Operation.CONVOLUTION, 1, output_activation=42),
            "(?s)convolution|output_activation.*got 42|constant",
        ),
    ],
)
def test_instructions_that_make_no_sense(row: Instruction, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(ONE, [torch.ones(2, 4)], row)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled kernels are not built")
@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 4, 3), (1, 3, 16)])
def test_weights_by_vectors_of_another_size(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(RuntimeError, match="weight: expected a contiguous"):
            run(
                ONE.to(dtype),
                [torch.ones(shape, dtype=dtype), torch.ones(8, dtype=dtype)],
                Instruction(Operation.POINTWISE, 1),
            )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled kernels are not built")
def test_constants_on_another_device() -> None:
    arguments: tuple[Any, ...] = (
        ONE,
        [torch.ones(2, 4), torch.ones(2, 4, device="meta")],
        list(Instruction(Operation.POOL, 1)),
    )
    with pytest.raises((RuntimeError, ValueError), match="one device"):
        torch.ops.biasloss_ext.program(*arguments)
