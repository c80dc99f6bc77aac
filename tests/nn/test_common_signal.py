"""Channels that share a signal which the expansion cancels: what remains is a millionth of what the Gram matrix sums."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from biasloss_ext.nn import FusedInvertedResidual, InvertedResidual
from biasloss_ext.ops.expand_depthwise import op, reference

LAST = torch.channels_last


def signal(size: float, noise: float, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = size * torch.randn(4, 1, 14, 14, generator=g) + noise * torch.randn(4, 16, 14, 14, generator=g)
    return x.to(dtype).contiguous(memory_format=LAST)


def cancel(weight: Tensor, share: float) -> None:
    """Makes a share of the rows orthogonal to what the channels have in common."""
    rows = weight[: int(share * len(weight))]
    rows -= rows.mean(1, keepdim=True)


def step(block: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = block(x)
    out.backward(grad)
    assert x.grad is not None
    found = {"output": out.detach(), "input": x.grad}
    found |= {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return found | {name: b.sqrt() for name, b in block.named_buffers() if name.endswith("running_var")}


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "noise"), [(30, 0.01), (1000, 1), (1, 1), (100, 1e-3)])
@pytest.mark.parametrize("share", [1.0, 0.02])
def test_a_block_is_as_exact_as_plain_layers(
    share: float, size: float, noise: float, stride: int, attention: bool
) -> None:
    torch.manual_seed(0)
    fused = FusedInvertedResidual(16, 64, 16, 3, stride=stride, squeeze_excite=attention)
    cancel(fused.conv[0].weight.data, share)
    plain = InvertedResidual(16, 64, 16, 3, stride=stride, squeeze_excite=attention)
    plain.load_state_dict(fused.state_dict())
    exact, x = copy.deepcopy(plain).double(), signal(size, noise, torch.float32)
    grad = torch.randn(4, 16, 14 // stride, 14 // stride)
    found, own, truth = step(fused, x, grad), step(plain, x, grad), step(exact, x.double(), grad.double())
    for name, value in truth.items():
        largest = value.abs().max()
        error, plain_error = ((t[name].double() - value).abs().max() / largest for t in (found, own))
        assert error <= 4 * plain_error + 2e-6, f"{name}: {error:.2e}, plain layers {plain_error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "noise"), [(30, 0.01), (3, 1), (0, 1)])
def test_products_with_the_gram_matrix(size: float, noise: float, dtype: torch.dtype) -> None:
    if dtype in (torch.bfloat16, torch.float16):
        noise *= 10  # it would be lost in the rounding of the signal
    x = signal(size, noise, dtype)
    mean, gram = op.gram(x, backend="cpu")
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).to(mean.dtype)
    cancel(weight, 0.5)
    product, moments = op.product(x, mean, gram, weight, weight @ gram, backend="cpu")
    exact_product, exact = reference.channel_gram_product(
        x.double(), mean.double(), gram.double(), weight.double(), gram
    )
    # Of the sums about the mean that was given: its own rounding is the same in both.
    tolerance = 1e-3 if dtype != torch.float64 else 1e-10
    spread = exact[1].sqrt()
    assert ((moments[1].double().sqrt() - spread).abs() <= tolerance * spread).all()
    assert ((moments[0].double() - exact[0]).abs() <= tolerance * spread).all()
    rows = exact_product.abs().amax(1)
    assert ((product.double() - exact_product).abs().amax(1) <= tolerance * rows).all()


def test_constant_channels_and_numbers_that_are_none() -> None:
    x = torch.full((2, 4, 3, 3), 7.0).contiguous(memory_format=LAST)
    weight = torch.randn(6, 4)
    for value in (7.0, torch.nan):
        x[0, 0, 0, 0] = value
        mean, gram = op.gram(x, backend="cpu")
        _, moments = op.product(x, mean, gram, weight, weight @ gram, backend="cpu")
        assert (moments[1] >= 0).all() if value == 7.0 else moments[1].isnan().all()


def test_bits_do_not_depend_on_threads() -> None:
    x, weight = signal(30, 0.01, torch.float32).repeat(8, 1, 3, 3).contiguous(memory_format=LAST), torch.randn(64, 16)
    cancel(weight, 1.0)
    mean, gram = op.gram(x, backend="cpu")
    arguments = (x, mean, gram, weight, weight @ gram)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(op.product(*arguments, backend="cpu"))
    torch.set_num_threads(before)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
