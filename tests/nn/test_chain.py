"""Chains of every form against the plain modules: outputs, gradients and running statistics, training and inference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from biasloss_ext import accelerate, optimize_for_inference
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.nn.plan import Plan, plan_of
from tests.nn import chains
from tests.nn.chains import Case

SEEDS = range(120)


def step(module: nn.Module, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a forward and a backward pass leave, by name."""
    x = case.images.to(dtype).requires_grad_()
    out = module.train(case.training)(x)
    names = [name for name, _ in module.named_parameters()]
    gradients = torch.autograd.grad(out.square().sum(), (x, *module.parameters()), allow_unused=True)
    found = {"output": out.detach(), **dict(zip(("input", *names), gradients, strict=True))}
    assert all(gradient is not None for gradient in found.values())
    return found | {f"statistic {name}": b.clone() for name, b in module.named_buffers() if b.is_floating_point()}


def fused(module: chains.Chained) -> FusedBlock:
    block = FusedBlock(copy.deepcopy(module), True)
    assert isinstance(block.plan(), Plan), block.plan()
    return block


@pytest.mark.parametrize("seed", SEEDS)
def test_a_chain_is_the_plain_modules_in_float64(seed: int) -> None:
    case = chains.drawn(seed)
    case.module.double()
    if isinstance(plan_of(case.module), str):
        assert all(isinstance(layer, nn.Conv2d | nn.Identity | nn.ReLU6) for layer in case.module.layers) or (
            not any(isinstance(layer, nn.BatchNorm2d | chains.FrozenNorm) for layer in case.module.modules())
        )
        return
    exact, ours = step(copy.deepcopy(case.module), case, torch.float64), step(fused(case.module), case, torch.float64)
    assert exact.keys() == ours.keys()
    largest = max(value.abs().max().item() for value in exact.values())
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-9 * largest, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        x = case.images.double()
        model = nn.Sequential(case.module, nn.Identity()).eval()
        torch.testing.assert_close(optimize_for_inference(model)(x), model(x), rtol=1e-9, atol=1e-9)


def test_as_close_to_float64_as_eager() -> None:
    """The error, over that of eager float32, in the mean over many chains: one draw's largest error is luck, eager's as ours."""
    ratios: dict[str, list[float]] = {"output": [], "input": [], "parameters": [], "statistics": []}
    for seed in SEEDS:
        case = chains.drawn(seed)
        if isinstance(plan_of(case.module), str):
            continue
        exact = step(copy.deepcopy(case.module).double(), case, torch.float64)
        eager, ours = (
            step(copy.deepcopy(case.module), case, torch.float32),
            step(fused(case.module), case, torch.float32),
        )
        largest = max(value.abs().max().item() for value in exact.values())
        for name, truth in exact.items():
            unit = torch.finfo(torch.float32).eps * max(truth.abs().max().item(), 1e-3 * largest)
            own, error = ((found[name].double() - truth).abs().max().item() / unit for found in (eager, ours))
            kind = name if name in ratios else "statistics" if name.startswith("statistic") else "parameters"
            ratios[kind].append(error / (own + 1))
    for kind, found in ratios.items():
        assert sum(found) / len(found) <= 2, kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The mean error within twice eager's: most are half of it, for fewer maps are rounded to 16 bits."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(40):
        case = chains.drawn(seed)
        if isinstance(plan_of(case.module), str) or not case.training:
            continue
        exact = step(copy.deepcopy(case.module).double(), case, torch.float64)
        with torch.autocast("cpu", dtype):
            eager = step(copy.deepcopy(case.module), case, torch.float32)
            ours = step(fused(case.module), case, torch.float32)
        for name in ("output", "input"):
            unit = exact[name].abs().max().item()
            pair = [(found[name].double() - exact[name]).abs().max().item() / unit for found in (ours, eager)]
            errors.setdefault(name, []).append((pair[0], pair[1]))
    for name, pairs in errors.items():
        ours_mean, own = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        assert ours_mean <= 2 * own, f"{name}: {ours_mean:.2g}, eager {own:.2g}"


def test_a_map_that_is_changed_in_place_is_read_before() -> None:
    """A later layer overwrites the input of a chain that has not ended."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            y = self.conv(h)
            h.relu_()
            return self.norm(y) + h

    torch.manual_seed(0)
    plain = nn.Sequential(Overwriting(), nn.Identity()).double()
    ours = copy.deepcopy(plain)
    accelerate(ours)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x))


def test_a_residual_that_is_broadcast() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + x.mean((2, 3), keepdim=True)

    torch.manual_seed(0)
    plain = nn.Sequential(Shifted(), nn.Identity()).double()
    ours = copy.deepcopy(plain)
    accelerate(ours)
    assert isinstance(ours[0], FusedBlock)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(optimize_for_inference(plain)(x), plain.eval()(x))


def test_a_cache_in_the_module_stays_as_it_was() -> None:
    """Tracing must not leave its stand-ins of tensors where the module keeps tensors from one call to another."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)
            self.shift, self.cache = nn.Parameter(torch.ones(8, 1, 1)), {}  # type: ignore[var-annotated]

        def forward(self, x: Tensor) -> Tensor:
            if "shift" not in self.cache:
                self.cache["shift"] = self.shift * 2
            return self.norm(self.conv(x)) + self.cache["shift"]

    model = nn.Sequential(Caching(), nn.Identity()).double().eval()
    accelerate(model)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert model(x).shape == x.shape
        assert all(isinstance(value, Tensor) for value in model[0].cache.values())
