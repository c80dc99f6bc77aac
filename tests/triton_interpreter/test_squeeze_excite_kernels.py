"""Kernels of the squeeze-and-excitation gate: more samples, channels and hidden units than a block, every activation that is
used, with and without the coefficients of the normalization before the pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biasloss_ext.ops import maps, triton_launch
from biasloss_ext.ops.squeeze_excite import op, reference
from biasloss_ext.ops.squeeze_excite import triton as squeeze_excite
from tests.triton_interpreter.against_reference import assert_matches, parameter

GATES = [(maps.RELU, maps.HARDSIGMOID), (maps.GELU, maps.SIGMOID)]
SIZES = [(3, 24, 8), (1, 1, 1), (19, 72, 40), (2, 5, 161)]


def parameters(channels: int, reduced: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    reduce_weight, expand_weight = (
        parameter(*size, dtype=dtype) / size[1] ** 0.5 for size in ((reduced, channels), (channels, reduced))
    )
    return reduce_weight, parameter(reduced, dtype=dtype), expand_weight, parameter(channels, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("activation", "gate_activation"), GATES)
@pytest.mark.parametrize(("samples", "channels", "reduced"), SIZES)
def test_gate(
    samples: int, channels: int, reduced: int, activation: int, gate_activation: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    pooled, gate_grad = (parameter(samples, channels, dtype=dtype) for _ in range(2))
    weights = parameters(channels, reduced, dtype)
    activations = {"activation": activation, "gate_activation": gate_activation}
    _, before, after = assert_matches(
        squeeze_excite.squeeze_excite, reference.squeeze_excite, (pooled, *weights), activations
    )
    arguments = (gate_grad, pooled, before, after, weights[0], weights[2])
    norm = {
        "sums": parameter(4, samples, channels, dtype=dtype),
        "affine": parameter(2, channels, dtype=dtype),
        "moments": parameter(2, channels, dtype=dtype).abs(),
        "positions": 6,
        "eps": 1e-3,
    }
    backward = squeeze_excite.squeeze_excite_backward, reference.squeeze_excite_backward
    *alone, none = assert_matches(*backward, arguments, activations)
    assert none.numel() == 0
    for frozen in (False, True):
        *again, coefficients = assert_matches(*backward, arguments, {**activations, **norm, "frozen": frozen})
        assert all(map(torch.equal, alone, again))
        assert coefficients[1:3].any() != frozen
    assert not any(counters.any() for counters in triton_launch._of_stream.values())


def test_other_layouts() -> None:
    torch.manual_seed(0)
    pooled, grad = torch.randn(70, 5).t(), torch.randn(5, 140)[:, ::2]
    weights = [t.t().contiguous().t() for t in parameters(70, 40, torch.float32)]
    outputs = assert_matches(squeeze_excite.squeeze_excite, reference.squeeze_excite, (pooled, *weights))
    assert_matches(
        squeeze_excite.squeeze_excite_backward,
        reference.squeeze_excite_backward,
        (grad, pooled, outputs[1], outputs[2], weights[0], weights[2]),
    )


def test_empty_batch() -> None:
    weight = torch.ones(2, 3)
    outputs = squeeze_excite.squeeze_excite(torch.empty(0, 3), weight, weight[:, 0], weight.t(), weight[0])
    assert [t.shape for t in outputs] == [(0, 3), (0, 2), (0, 3)]
    arguments: tuple[Any, ...] = (outputs[0], outputs[0], outputs[1], outputs[2], weight, weight.t().contiguous())
    gradients = squeeze_excite.squeeze_excite_backward(*arguments)
    assert [t.shape for t in gradients] == [(0, 3), (2, 3), (2,), (3, 2), (3,), (0,)]
    assert all(t.abs().sum() == 0 for t in gradients)


def test_as_an_op() -> None:
    weight, bias = torch.randn(2, 3), torch.randn(3)
    arguments = (torch.randn(4, 3), weight, bias[:2].clone(), torch.randn(3, 2), bias)
    torch.library.opcheck(op.forward.triton, arguments, test_utils=("test_schema", "test_faketensor"))
    for unknown in ({"activation": 9}, {"gate_activation": -1}):
        with pytest.raises(ValueError, match="supported: 0 \\(identity\\)"):
            op.forward.triton(*arguments, **unknown)
