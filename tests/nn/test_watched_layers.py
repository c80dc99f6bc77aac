"""Whoever watches the layers of a network, by hooks or by counting operations, sees what the plain network shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from biasloss_ext import accelerate
from biasloss_ext.models import skipblocknet_xs
from biasloss_ext.nn import DepthwiseConv2d
from biasloss_ext.ops.flops import FORMULAS
from biasloss_ext.ops.registry import OPS
from tests.nn import lookalikes


def accelerated() -> nn.Module:
    model = lookalikes.network()
    assert accelerate(model).swapped
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "skipblocknet_xs": (lambda: skipblocknet_xs(fused=False), skipblocknet_xs),
    "accelerated": (lookalikes.network, accelerated),
}


@pytest.fixture(params=NETWORKS)
def networks(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Plain and fused."""
    plain, fused = (make() for make in NETWORKS[request.param])
    fused.load_state_dict(plain.state_dict())
    return plain, fused


IMAGES = torch.randn(2, 3, 32, 32)


def called(model: nn.Module) -> set[str]:
    seen: set[str] = set()
    handles = [
        layer.register_forward_hook(lambda *_, name=name: seen.add(name))  # type: ignore[misc]
        for name, layer in model.named_modules()
        if not list(layer.children())
    ]
    model(IMAGES)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_hooks_on_all_layers_are_called(networks: tuple[nn.Module, nn.Module], training: bool) -> None:
    plain, fused = (model.train(training) for model in networks)
    assert called(fused) == called(plain)


def test_a_hook_on_any_one_layer_is_called(networks: tuple[nn.Module, nn.Module]) -> None:
    """Also where the layers around it are fused."""
    _, fused = networks
    for name, layer in fused.eval().named_modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            seen: list[int] = []
            handle = layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))  # type: ignore[misc]
            fused(IMAGES)
            handle.remove()
            assert seen, name


def test_operations_are_counted(networks: tuple[nn.Module, nn.Module]) -> None:
    counts = []
    for model in networks:
        with FlopCounterMode(display=False) as counter:
            model(IMAGES)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_operations_of_a_depthwise_convolution_are_counted(stride: int) -> None:
    """Forward as PyTorch's; backward twice that. PyTorch counts the gradient of a grouped weight as if it were not grouped."""
    counts = []
    for kind in (nn.Conv2d, DepthwiseConv2d):
        layer = kind(16, 16, 5, stride, 2, groups=16)
        x = torch.randn(2, 16, 9, 7, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out = layer(x)
            counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counts[0] == counts[1] > 0
    assert counter.get_total_flops() == 2 * counts[1]


def test_operations_of_every_op_with_convolutions_have_a_formula() -> None:
    convolving = {name for name in OPS if "pointwise" in name or "depthwise" in name}
    assert convolving == set(FORMULAS)


@pytest.mark.parametrize("first", ["import biasloss_ext", "import torch.utils.flop_counter"])
def test_formulas_are_known_whatever_is_imported_first(first: str) -> None:
    script = (
        f"{first}\n"
        "import torch\n"
        "from biasloss_ext.nn import DepthwiseConv2d\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    DepthwiseConv2d(8, 8, 3, padding=1, groups=8)(torch.randn(1, 8, 4, 4))\n"
        "assert counter.get_total_flops() == 2 * 16 * 8 * 9, counter.get_total_flops()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
