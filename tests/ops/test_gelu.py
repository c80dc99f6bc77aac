"""Both forms of GELU and their derivatives, by the kernels of the CPU, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm
from biasloss_ext.ops.library import accumulation_dtype
from tests.runnable import backends_of

INFINITE = math.inf
# The last are multiplied with themselves in a kernel, which must not turn a finite result into NaN.
SPECIAL = (0.0, -0.0, 1e-30, -1e-30, 10, -10, 100, -100, INFINITE, -INFINITE, math.nan, 1e30, -1e30)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FORMS = {maps.GELU: "none", maps.GELU_TANH: "tanh"}
pytestmark = pytest.mark.skipif("cpu" not in backends_of("batch_norm_apply"), reason="no CPU kernels here")


def inputs(dtype: torch.dtype) -> Tensor:
    """One channel; no whole number of vectors."""
    dense = (torch.linspace(-20, 20, 40001, dtype=torch.float64), torch.linspace(-0.5, 0.5, 10001, dtype=torch.float64))
    return torch.cat((*dense, torch.tensor(SPECIAL, dtype=torch.float64))).to(dtype).reshape(1, 1, 1, -1)


def exact(u: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """Value and derivative in float64, without the cancellation of torch's own in the left tail."""
    if activation == maps.GELU:
        below = 0.5 * torch.special.erfc(-u * math.sqrt(0.5))
        return u * below, below + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    bounded = u.clamp(-25, 25)
    linear, cubic = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
    v = bounded * (linear + cubic * bounded**2)
    below, above = torch.sigmoid(v), torch.sigmoid(-v)
    return u * below, below + u * (below * above * (linear + 3 * cubic * bounded**2))


def by_torch(u: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    leaf = u.clone().requires_grad_()
    h = F.gelu(leaf, approximate=FORMS[activation])
    return h.detach(), torch.autograd.grad(h.sum(), leaf)[0]


def by_maps(u: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(u.dtype)
    affine = torch.tensor([[1.0], [-0.0]], dtype=wide)  # the sum of -0 and 0 would be 0
    coefficients = torch.tensor([[1.0], [0.0], [0.0], [0.0], [0.0], [0.0]], dtype=wide)
    options: dict[str, Any] = {"activation": activation, "backend": "cpu"}
    # Vectors lie along the channels: as many channels as there are values, then some of them as positions of one.
    wide_u = u.reshape(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)
    along = affine.expand(2, wide_u.shape[1]).contiguous(), coefficients.expand(6, wide_u.shape[1]).contiguous()
    ones = torch.ones_like(wide_u)
    h = batch_norm.apply(wide_u, along[0], **options)
    slope = batch_norm.backward(ones, wide_u, *along, **options)
    few = u[..., -37:].contiguous(memory_format=torch.channels_last)
    alone = batch_norm.apply(few, affine, **options)
    assert torch.equal(alone.flatten().nan_to_num(), h.flatten()[-37:].nan_to_num())
    return h, slope


@pytest.mark.parametrize("activation", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_derivative(activation: int, dtype: torch.dtype) -> None:
    u = inputs(dtype)
    truth, own = exact(u.double(), activation), by_torch(u.to(accumulation_dtype(dtype)), activation)
    for name, ours, expected, others in zip(("h", "h'"), by_maps(u, activation), truth, own, strict=True):
        assert ours.dtype == dtype
        mine, expected, torchs = (t.flatten().double() for t in (ours, expected, others))
        assert_special(mine, expected, u.flatten(), name)
        finite = expected.isfinite()
        mine, expected, torchs = mine[finite], expected[finite], torchs[finite]
        scale = expected.abs().clamp(min=1.0)
        error = ((mine - expected).abs() / scale).max().item()
        of_torch = ((torchs - expected).abs() / scale).nan_to_num(0.0).max().item()
        # Four roundings in the accumulation dtype, and the one of what is stored.
        rounding = 4 * torch.finfo(others.dtype).eps + (torch.finfo(dtype).eps if dtype != others.dtype else 0.0)
        assert error <= of_torch + rounding, f"{name}: {error:.3g}, torch's {of_torch:.3g}"
        if dtype == torch.float64:
            assert error < 1e-14


def assert_special(mine: Tensor, expected: Tensor, u: Tensor, name: str) -> None:
    assert torch.equal(mine.isnan(), expected.isnan()), name
    infinite = expected.isinf()
    assert torch.equal(mine[infinite], expected[infinite]), name
    tiny = u.abs() <= 1e-30
    torch.testing.assert_close(mine[tiny], expected[tiny], rtol=1e-2 if u.dtype == torch.bfloat16 else 1e-6, atol=0)
    if name == "h":
        assert torch.equal(mine[tiny].signbit(), u[tiny].signbit())
