"""Kernels of the squeeze-and-excitation gate: more samples and channels than a block, every activation that is used."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter.against_reference import assert_matches

from biasloss_ext.ops import maps
from biasloss_ext.ops.squeeze_excite import op, reference
from biasloss_ext.ops.squeeze_excite import triton as squeeze_excite

GATES = [(maps.RELU, maps.HARDSIGMOID), (maps.SILU, maps.SIGMOID)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("activation", "gate_activation"), GATES)
@pytest.mark.parametrize(("samples", "channels", "reduced"), [(3, 24, 8), (1, 1, 1), (35, 72, 40)])
def test_gate(
    samples: int, channels: int, reduced: int, activation: int, gate_activation: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    pooled, gate_grad = (torch.randn(samples, channels, dtype=dtype) for _ in range(2))
    reduce_weight, expand_weight = (
        torch.randn(*size, dtype=dtype) / size[1] ** 0.5 for size in ((reduced, channels), (channels, reduced))
    )
    biases = [torch.randn(size, dtype=dtype) for size in (reduced, channels)]
    arguments = (pooled, reduce_weight, biases[0], expand_weight, biases[1], activation, gate_activation)
    _, before, after = assert_matches(squeeze_excite.squeeze_excite, reference.squeeze_excite, arguments)
    arguments = (gate_grad, pooled, before, after, reduce_weight, expand_weight, activation, gate_activation)
    assert_matches(squeeze_excite.squeeze_excite_backward, reference.squeeze_excite_backward, arguments)


def test_empty_batch() -> None:
    weight = torch.ones(2, 3)
    outputs = squeeze_excite.squeeze_excite(torch.empty(0, 3), weight, weight[:, 0], weight.t(), weight[0], 1, 5)
    assert [t.shape for t in outputs] == [(0, 3), (0, 2), (0, 3)]
    gradients = squeeze_excite.squeeze_excite_backward(
        outputs[0], outputs[0], outputs[1], outputs[2], weight, weight.t().contiguous(), 1, 5
    )
    assert [t.shape for t in gradients] == [(0, 3), (2, 3), (2,), (3, 2), (3,)]
    assert all(t.abs().sum() == 0 for t in gradients)


def test_as_an_op() -> None:
    weight, bias = torch.randn(2, 3), torch.randn(3)
    arguments = (torch.randn(4, 3), weight, bias[:2].clone(), torch.randn(3, 2), bias, 1, 5)
    torch.library.opcheck(op.forward.triton, arguments, test_utils=("test_schema", "test_faketensor"))
