"""Fused blocks against the plain ones in float64: outputs, gradients, running statistics; both schemes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from biasloss_ext.nn import FusedInvertedResidual, FusedSkipBlock, InvertedResidual, SkipBlock
from biasloss_ext.nn.chain import Chain
from biasloss_ext.nn.fused_chain import fused_chain
from biasloss_ext.nn.fused_inverted_residual import chain_of
from tests.nn.blocks import Case, cases, drawn_case, randomize, step

SCHEMES = {"expand-free": True, "stored": False}


class Fused(nn.Module):
    """A plain block through the fused ops, whatever backend."""

    def __init__(self, block: InvertedResidual, scheme: bool, backend: str) -> None:
        super().__init__()
        self.block, self.scheme, self.backend = block, scheme, backend

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.block.has_residual else None
        return fused_chain(x, chain_of(self.block.conv), residual, recompute=self.scheme, backend=self.backend)


def fused_step(case: Case, scheme: bool, backend: str, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    block = copy.deepcopy(case.block).to(dtype).train(case.training)
    return step(Fused(block, scheme, backend), block, case.images.to(dtype), case.grad.to(dtype), **options)


def plain_step(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    block = copy.deepcopy(case.block).to(dtype).train(case.training)
    return step(block, block, case.images.to(dtype), case.grad.to(dtype))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_the_algebra_is_exact(backend: str, scheme: str, case: Case) -> None:
    """In float64 the fused block is the plain one."""
    exact, fused = plain_step(case, torch.float64), fused_step(case, SCHEMES[scheme], backend, torch.float64)
    assert exact.keys() == fused.keys()
    largest = max(value.abs().max().item() for name, value in exact.items() if name.startswith("gradient"))
    for name, value in exact.items():
        # What is zero in exact arithmetic, like the gradient of a shift before a normalization, is rounding in both.
        scale = max(value.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(fused[name], value, rtol=0, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_close_to_float64_as_eager(scheme: str) -> None:
    """One draw's largest error is luck, eager's as ours: it is the mean over many that must stay within twice eager's own."""
    errors: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for seed in range(60):
        offset = (0.0, 3.0, 100.0)[seed % 3]
        case = drawn_case(seed, offset)
        exact, eager = plain_step(case, torch.float64), plain_step(case, torch.float32)
        fused = fused_step(case, SCHEMES[scheme], "cpu", torch.float32)
        largest = max(value.abs().max().item() for name, value in exact.items() if name.startswith("gradient"))
        for name, truth in exact.items():
            scale = largest if name.startswith("gradient") else max(truth.abs().max().item(), 1.0)
            unit = scale * torch.finfo(torch.float32).eps
            pair = tuple((value[name].double() - truth).abs().max().item() / unit for value in (fused, eager))
            errors.setdefault((offset, name), []).append(pair)
            assert pair[0] <= 20 * pair[1] + 50 * (1 + offset / 10), f"seed {seed}, {name}: {pair}"
    for key, pairs in errors.items():
        ours, own = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        assert ours <= 2 * own + 1, f"{key}: {ours:.2f} roundings, eager {own:.2f}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast(scheme: str, dtype: torch.dtype) -> None:
    """The mean error over some draws, within twice eager's; most are half of it, for fewer maps are rounded to 16 bits."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(8):
        case = drawn_case(seed, 0.0)
        exact = plain_step(case, torch.float64)
        with torch.autocast("cpu", dtype):
            eager, fused = plain_step(case, torch.float32), fused_step(case, SCHEMES[scheme], "cpu", torch.float32)
        assert fused["output"].dtype == dtype
        for name, truth in exact.items():
            assert name == "output" or fused[name].dtype == torch.float32
            unit = truth.abs().max().item() + 1e-9
            pair = tuple((value[name].double() - truth).abs().max().item() / unit for value in (fused, eager))
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        ours, own = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        assert ours <= 2 * own + 1e-5, f"{name}: {ours:.2g}, eager {own:.2g}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bit_identical_from_run_to_run(scheme: str) -> None:
    case = Case(InvertedResidual(24, 72, 24, 5, 1, True), torch.randn(3, 24, 14, 14), torch.randn(3, 24, 14, 14), True)
    first, second = (fused_step(case, SCHEMES[scheme], "cpu", torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_block_without_expansion() -> None:
    block = InvertedResidual(8, 8, 12, 3, 2, True)
    randomize(block, torch.Generator().manual_seed(1))
    block = block.double()
    chain = Chain(chain_of(block.conv).steps[1:])
    plain = nn.Sequential(*block.conv[3:])
    images, grad = torch.randn(2, 8, 7, 9, dtype=torch.float64), torch.randn(2, 12, 4, 5, dtype=torch.float64)
    twin = copy.deepcopy(plain)
    exact = {name: value.clone() for name, value in step(plain, plain, images, grad).items()}
    block.zero_grad()
    for here, there in zip(plain.parameters(), twin.parameters(), strict=True):
        here.data.copy_(there.data)
    for here, there in zip(plain.buffers(), twin.buffers(), strict=True):
        here.copy_(there)

    class Twin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fused_chain(x, chain, backend="cpu")

    fused = step(Twin(), plain, images, grad)
    for name, value in exact.items():
        # torch takes the sixth of the hard sigmoid's slope in float32, whatever the dtype.
        torch.testing.assert_close(fused[name], value, rtol=0, atol=1e-7 * value.abs().max().item())


def test_skip_block() -> None:
    plain = SkipBlock(8, 24, 16, 5)
    randomize(plain, torch.Generator().manual_seed(2))
    plain = plain.double()
    fused = FusedSkipBlock(8, 24, 16, 5).double()
    fused.load_state_dict(plain.state_dict())
    early, later, grad = (torch.randn(s, dtype=torch.float64) for s in ((2, 8, 12, 16), (2, 16, 3, 4), (2, 16, 3, 4)))
    results = []
    for block in (plain, fused):
        inputs = [t.clone().requires_grad_() for t in (early, later)]
        out = block(*inputs)
        out.backward(grad)
        results.append([out, *(t.grad for t in inputs), *(p.grad for p in block.parameters()), *block.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_saves_little_for_backward() -> None:
    """The expanded map is not among what is kept, and the rest is kept once."""

    def saved_bytes(block: nn.Module) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        images = torch.randn(4, 16, 32, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(images)
        return sum(seen.values())

    plain, fused = InvertedResidual(16, 96, 16, 3), FusedInvertedResidual(16, 96, 16, 3)
    assert saved_bytes(fused) <= 0.35 * saved_bytes(plain)


def test_errors() -> None:
    with pytest.raises(
        ValueError, match="FusedInvertedResidual has no fused kernels: the kernel is 9 x 9, there are 3 x 3"
    ):
        FusedInvertedResidual(8, 16, 8, 9, fused=True)
    with pytest.raises(ValueError, match="has no fused kernels: the activation is Tanh"):
        FusedInvertedResidual(8, 16, 8, 3, activation=nn.Tanh, fused=True)
    with pytest.raises(ValueError, match="fused must be 'auto', True or False, got 'yes'"):
        FusedInvertedResidual(8, 16, 8, 3, fused="yes")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"FusedInvertedResidual\(fused=True\) cannot run here: no kernels of"):
        FusedInvertedResidual(8, 16, 8, 3, fused=True).to("meta")(torch.empty(1, 8, 4, 4, device="meta"))
    odd = FusedInvertedResidual(8, 16, 8, 9)  # "auto" takes the plain layers
    assert odd(torch.randn(1, 8, 12, 12)).shape == (1, 8, 12, 12)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    out = FusedInvertedResidual(8, 16, 8, 3)(x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_one_value_per_channel_cannot_be_normalized() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FusedInvertedResidual(8, 16, 8, 3)(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_layouts(layout: str) -> None:
    block = FusedInvertedResidual(8, 16, 8, 3).eval()
    x = torch.randn(2, 8, 6, 5)
    laid_out = {
        "contiguous": x,
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.cat((x, x), 1)[:, :8],
    }[layout]
    with torch.no_grad():
        torch.testing.assert_close(
            block(laid_out), block(x.contiguous(memory_format=torch.channels_last)), rtol=0, atol=0
        )


def test_a_converted_normalization_alone_is_a_batch_norm() -> None:
    """SyncBatchNorm of one process; torch's own refuses to run on CPUs."""
    plain = InvertedResidual(8, 16, 8, 3).double()
    fused = FusedInvertedResidual(8, 16, 8, 3).double()
    fused.load_state_dict(plain.state_dict())
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)


def test_momentum_none_and_no_statistics() -> None:
    for options in (
        {"momentum": None},
        {"track_running_stats": False},
        {"affine": False},
        {"eps": 0.1, "momentum": 0.5},
    ):
        plain = InvertedResidual(8, 16, 8, 3)
        for index in (1, 4, 8):
            plain.conv[index] = nn.BatchNorm2d(plain.conv[index].num_features, **options)
        fused = FusedInvertedResidual(8, 16, 8, 3)
        fused.conv = copy.deepcopy(plain.conv)
        plain, fused = plain.double(), fused.double()
        for _ in range(2):
            x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)
        for a, b in zip(plain.buffers(), fused.buffers(), strict=True):
            torch.testing.assert_close(b, a)
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)
