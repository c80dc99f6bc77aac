"""The instructions of programs on bytes: the compiled kernels compute the integers of the reference, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.nn.quantization.weights import LARGEST_WEIGHT, quantized_weight
from biasloss_ext.ops import backends, maps
from biasloss_ext.ops.native import native
from biasloss_ext.ops.program.code import Instruction, Operation
from biasloss_ext.ops.program.packing import (
    LARGEST_PAIR,
    largest_pairs,
    pack,
    pack_taps,
    padded,
    unpack,
    unpack_taps,
)
from biasloss_ext.ops.registry import OPS
from tests.runnable import assert_tests_pass_on

HAS_KERNELS = backends.why_not("cpu", torch.device("cpu"), "program") is None and bool(native().build.get("cpu_int8"))
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="this CPU or build has no int8 kernels")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_kernels)]
X, Y, Z = (torch.tensor(levels) for levels in ([0.02, 13.0], [0.03, 37.0], [0.01, 200.0]))
FLOAT = torch.empty(0)
EXACT = (maps.IDENTITY, maps.RELU, maps.RELU6, maps.HARDSWISH, maps.HARDSIGMOID)
BY_EXPONENTIALS = tuple(int(a) for a in maps.Activation if a not in EXACT)
KERNELS = (3, 5, 7)  # of depthwise convolutions


def draw(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def bytes_map(*shape: int) -> Tensor:
    x = draw(0, 256, *shape).to(torch.uint8)
    return maps.channels_last(x) if x.dim() == 4 else x


def whole_numbers(packing: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    """A weight as the quantization rounds it: the largest of each output is 127, or a pair that is added up first is 128."""
    real = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    weight, _ = quantized_weight(real, torch.zeros(shape[0]), 1.0, packing)
    return weight.long()


def operands(weight: Tensor, packed: Tensor, to: Tensor) -> list[Tensor]:
    """Of a convolution whose sums fill the range of the result."""
    outputs, terms = weight.shape[0], weight[0].numel()
    bias = padded(draw(-9000, 9000, outputs).to(torch.int32))
    scale = padded((draw(1, 100, outputs) / 2.0e4 / terms**0.5).float())
    return [packed.to(torch.int8), bias, scale, X, to]


def run(x: Tensor, constants: list[Tensor], *rows: Instruction, backend: str = "cpu") -> Tensor:
    result: Tensor = OPS["program"](x, constants, [int(field) for row in rows for field in row], backend=backend)
    return result


def of_reals(x: Tensor, weight: Tensor, constants: list[Tensor], activation: int, **geometry: int) -> Tensor:
    """The same layer on the numbers that the bytes stand for, in float64."""
    _, bias, scale, levels, _ = constants
    outputs = weight.shape[0]
    scale_of, bias_of = scale[:outputs].double(), bias[:outputs].double()
    zero = levels[1].double()
    q = x.double() - zero
    shape = (-1, 1, 1) if x.dim() == 4 else (-1,)
    product = F.conv2d(q, weight.double(), **geometry) if x.dim() == 4 else F.linear(q, weight.double().flatten(1))
    # What the zero of x adds to a sum is in the bias, which is that of the layer here plus this.
    of_zero = zero * weight.double().flatten(1).sum(1)
    return maps.activate((product + (bias_of + of_zero).view(shape)) * scale_of.view(shape), activation)


CONVOLUTIONS = [
    (1, 24, 7, 9, 1, 72, 1, 0),
    (2, 3, 17, 20, 3, 16, 2, 1),
    (3, 40, 5, 6, 1, 33, 1, 0),
    (1, 8, 14, 14, 3, 24, 1, 1),
    (2, 130, 7, 7, 1, 160, 1, 0),
    (2, 16, 5, 5, 1, 128, 2, 0),
    (1, 5, 3, 2, 5, 7, 1, 4),
]


@pytest.mark.parametrize("to", [Y, FLOAT], ids=["bytes", "float32"])
@pytest.mark.parametrize("activation", [*EXACT, *BY_EXPONENTIALS])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: tuple[int, ...], activation: int, to: Tensor) -> None:
    samples, channels, height, width, kernel, outputs, stride, padding = case
    x, weight = bytes_map(samples, channels, height, width), whole_numbers(pack, outputs, channels, kernel, kernel)
    constants = operands(weight, pack(weight.double()), to)
    geometry = {"stride": stride, "padding": padding}
    row = Instruction(
        Operation.QUANTIZED_CONVOLUTION, 1, output_activation=activation, kernel=kernel, outputs=outputs, **geometry
    )
    check(x, weight, constants, row, activation, **geometry)


@pytest.mark.parametrize("activation", [maps.HARDSIGMOID, maps.SIGMOID])
@pytest.mark.parametrize(("samples", "depth", "outputs"), [(1, 960, 40), (3, 7, 5), (50, 33, 130)])
def test_linear(samples: int, depth: int, outputs: int, activation: int) -> None:
    x, weight = bytes_map(samples, depth), whole_numbers(pack, outputs, depth, 1, 1)
    constants = operands(weight, pack(weight.double()), Y)
    row = Instruction(Operation.QUANTIZED_CONVOLUTION, 1, output_activation=activation, outputs=outputs)
    check(x, weight, constants, row, activation)


@pytest.mark.parametrize("activation", [maps.RELU, maps.HARDSWISH, maps.SILU])
@pytest.mark.parametrize("same_padding", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [(1, 24, 7, 9), (2, 34, 10, 13), (1, 5, 1, 2)])
def test_depthwise(size: tuple[int, ...], kernel: int, stride: int, same_padding: bool, activation: int) -> None:
    packing = partial(pack_taps, stride=stride)
    x, weight = bytes_map(*size), whole_numbers(packing, size[1], 1, kernel, kernel)
    constants = operands(weight, packing(weight.double()), Y)
    geometry = {"kernel": kernel, "stride": stride, "same_padding": int(same_padding)}
    row = Instruction(Operation.QUANTIZED_DEPTHWISE, 1, output_activation=activation, outputs=size[1], **geometry)
    if same_padding and stride == 2:
        check(x, None, constants, row, activation)
    else:
        check(x, weight, constants, row, activation, stride=stride, padding=kernel // 2, groups=size[1])


def check(
    x: Tensor, weight: Tensor | None, constants: list[Tensor], row: Instruction, activation: int, **geometry: int
) -> None:
    """The reference against float64 on the numbers that bytes stand for, the kernels against the reference."""
    expected = run(x, constants, row, backend="reference")
    if weight is not None:
        real, to = of_reals(x, weight, constants, activation, **geometry), constants[4]
        if to.numel():
            step, zero = to.double()
            levels = (real / step + zero).clamp(0, 255)
            assert (expected.double() - levels).abs().max() <= 0.5 + 1e-3
        else:
            torch.testing.assert_close(expected.double(), real, rtol=1e-5, atol=1e-6)
    if not HAS_KERNELS:
        return
    ours = run(x, constants, row)
    assert ours.dtype is expected.dtype
    assert ours.shape == expected.shape
    if activation in EXACT:
        assert torch.equal(ours, expected)
    elif ours.dtype is torch.uint8:
        assert (ours.int() - expected.int()).abs().max() <= 1
        assert (ours != expected).double().mean() < 1e-3
    else:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sums_of_any_shape(data: st.DataObject) -> None:
    """Of the largest bytes and of any: what 16 bits could not hold would show."""
    size = [data.draw(st.integers(1, most), label=name) for name, most in (("N", 2), ("C", 70), ("H", 20), ("W", 20))]
    stride, activation = data.draw(st.integers(1, 2)), data.draw(st.sampled_from(EXACT))
    x = bytes_map(*size)
    if data.draw(st.booleans(), label="the largest bytes"):
        x = torch.full_like(x, 255)
    fields = {"stride": stride, "output_activation": activation}
    if data.draw(st.booleans(), label="depthwise"):
        kernel, packing = data.draw(st.sampled_from(KERNELS)), partial(pack_taps, stride=stride)
        weight = whole_numbers(packing, size[1], 1, kernel, kernel)
        operation = Operation.QUANTIZED_DEPTHWISE
        fields["same_padding"] = int(data.draw(st.booleans(), label="same padding"))
    else:
        kernel, packing = data.draw(st.integers(1, min(3, *size[2:]))), pack
        weight = whole_numbers(packing, data.draw(st.integers(1, 150), label="outputs"), size[1], kernel, kernel)
        operation = Operation.QUANTIZED_CONVOLUTION
        fields["padding"] = data.draw(st.integers(0, kernel - 1), label="padding")
    constants = operands(weight, packing(weight.double()), data.draw(st.sampled_from([Y, FLOAT])))
    row = Instruction(operation, 1, kernel=kernel, outputs=len(weight), **fields)
    assert torch.equal(run(x, constants, row), run(x, constants, row, backend="reference"))


@pytest.mark.parametrize("packing", [pack, *(partial(pack_taps, stride=stride) for stride in (1, 2))])
def test_no_pair_of_weights_is_too_large(packing: Callable[[Tensor], Tensor]) -> None:
    """One weight alone keeps all 127 steps; of two that are equal and added up first, each has half of the 128."""
    is_taps = packing is not pack
    alone, pairs = (torch.zeros(3, 1, 3, 3) if is_taps else torch.zeros(3, 4, 1, 1) for _ in range(2))
    alone.flatten(1)[:, 1] = torch.tensor([1.0, -2.0, 3.0])
    pairs.flatten(1)[:, [0, 2 if is_taps else 1]] = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    for weight, largest in ((alone, [127, 127, 127]), (pairs, [64, 64, 127])):
        quantized, step = quantized_weight(weight, torch.zeros(3), 1.0, packing)
        assert quantized.flatten(1).abs().amax(1).tolist() == largest
        assert (largest_pairs(packing(quantized)) <= LARGEST_PAIR).all()
        assert ((quantized * step.view(-1, 1, 1, 1) - weight).abs() <= step.view(-1, 1, 1, 1) / 2).all()
    assert LARGEST_PAIR * 255 < 2**15 <= (LARGEST_WEIGHT + LARGEST_WEIGHT) * 255


@needs_kernels
@pytest.mark.skipif(native().build.get("cpu_int8") == "AVX2", reason="no other instruction set")
def test_on_avx2() -> None:
    assert_tests_pass_on("avx2", "any_shape or linear or between", __file__)


@needs_kernels
@pytest.mark.parametrize("channels", [24, 75])
def test_what_lies_between_convolutions(channels: int) -> None:
    """Levels, residuals, gates, pools and averages, on maps whose last vectors are not full."""
    x = torch.randn(2, channels, 9, 7, generator=torch.Generator().manual_seed(0))
    weight = whole_numbers(pack, channels, channels, 1, 1)
    convolution = operands(weight, pack(weight.double()), Y)
    taps = whole_numbers(partial(pack_taps, stride=2), channels, 1, 3, 3)
    depthwise = operands(taps, pack_taps(taps.double(), 2), Y)
    geometry = {"outputs": channels, "output_activation": maps.RELU}
    rows = [
        Instruction(Operation.QUANTIZE, 1, constants=0),
        Instruction(Operation.QUANTIZED_CONVOLUTION, 2, input=1, other=1, constants=1, **geometry),
        Instruction(Operation.QUANTIZED_POOL, 3, input=2, constants=5),
        Instruction(Operation.QUANTIZED_GATE, 4, input=2, gate=3, constants=5),
        Instruction(Operation.QUANTIZED_DEPTHWISE, 5, input=4, constants=7, kernel=3, stride=2, **geometry),
        Instruction(Operation.QUANTIZED_AVERAGE, 6, input=1, other=5),
        Instruction(Operation.DEQUANTIZE, 7, input=6, constants=0),
    ]
    constants = [X, *convolution, X, *depthwise]
    constants[5:7] = [Y, X]
    for last in range(1, len(rows) + 1):
        for same in (x, maps.channels_last(x), x.transpose(2, 3).contiguous().transpose(2, 3)):
            ours = run(same, constants, *rows[:last])
            expected = run(same, constants, *rows[:last], backend="reference")
            assert torch.equal(ours, expected), rows[last - 1]
            assert ours.stride() == expected.stride()


@pytest.mark.parametrize(("outputs", "channels", "kernel"), [(16, 4, 1), (33, 5, 3)])
def test_packing_is_undone(outputs: int, channels: int, kernel: int) -> None:
    weight = draw(-127, 128, outputs, channels, kernel, kernel)
    assert torch.equal(unpack(pack(weight), outputs, channels, kernel), weight)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_packing_of_taps_is_undone(kernel: int, stride: int) -> None:
    weight = draw(-127, 128, 24, 1, kernel, kernel)
    assert torch.equal(unpack_taps(pack_taps(weight, stride), 24, kernel), weight)


REFUSED: dict[str, tuple[Instruction, list[Tensor], str]] = {
    "a float map": (Instruction(Operation.QUANTIZED_POOL, 1), [X], "expected a map of bytes"),
    "no step": (Instruction(Operation.QUANTIZE, 1), [torch.zeros(2)], "expected a positive step"),
    "three levels": (
        Instruction(Operation.QUANTIZE, 1),
        [torch.ones(3)],
        r"expected 2 float32 values \(step, zero\), got 3",
    ),
}


@needs_kernels
@pytest.mark.parametrize("case", REFUSED)
def test_instructions_that_make_no_sense(case: str) -> None:
    row, constants, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        run(maps.channels_last(torch.ones(1, 4, 3, 3)), constants, row)


@needs_kernels
@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(1, 1, 16, 4), "weight"),
        (0, torch.zeros(7, dtype=torch.int8), "weight: expected"),
        (1, torch.zeros(3, dtype=torch.int32), "bias: expected 16"),
        (2, torch.zeros(16, dtype=torch.float64), "scale: expected 16"),
        (4, torch.tensor([1.0, 256.0]), "a zero from 0 to 255"),
    ],
)
def test_operands_that_do_not_fit(index: int, wrong: Tensor, message: str) -> None:
    weight = whole_numbers(pack, 8, 4, 1, 1)
    constants = operands(weight, pack(weight.double()), Y)
    constants[index] = wrong
    row = Instruction(Operation.QUANTIZED_CONVOLUTION, 1, outputs=8)
    with pytest.raises(RuntimeError, match=message):
        run(bytes_map(1, 4, 3, 3), constants, row)
