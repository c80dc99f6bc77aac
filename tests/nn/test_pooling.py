"""The average to a size: values and gradients of adaptive_avg_pool2d on every way, and no nondeterministic operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from biasloss_ext.nn import SkipBlock, pooling
from biasloss_ext.nn.pooling import average_to

SIZES = [  # of the map, of the result
    ((112, 112), (28, 28)),
    ((57, 57), (29, 29)),
    ((15, 9), (4, 9)),
    ((7, 5), (3, 2)),
    ((6, 7), (3, 2)),
    ((3, 2), (5, 4)),
    ((1, 1), (1, 1)),
    ((8, 8), (8, 8)),
]


def both(x: Tensor, size: tuple[int, int], deterministic: bool | None) -> list[tuple[Tensor, Tensor]]:
    """(result, gradient) of the function and of PyTorch's."""
    grad = torch.randn(*x.shape[:2], *size, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (
        lambda leaf: average_to(leaf, size, deterministic),
        lambda leaf: F.adaptive_avg_pool2d(leaf, size),
    ):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        result = function(leaf)
        found.append((result.detach(), *torch.autograd.grad(result, leaf, grad)))
    return found


@pytest.mark.parametrize("deterministic", [None, True])
@pytest.mark.parametrize(("of_map", "size"), SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(
    of_map: tuple[int, int], size: tuple[int, int], deterministic: bool | None, layout: torch.memory_format
) -> None:
    x = torch.randn(2, 3, *of_map, dtype=torch.float64).contiguous(memory_format=layout)
    (result, gradient), (expected, expected_gradient) = both(x, size, deterministic)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-14)
    assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_maps_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 57, 31).to(dtype)
    exact = F.adaptive_avg_pool2d(x.double(), (29, 13))
    errors = [(average_to(x, (29, 13), way).double() - exact).abs().max() for way in (True, False)]
    assert average_to(x, (29, 13), True).dtype == dtype
    assert errors[0] <= 2 * errors[1]


def test_autocast_does_not_narrow_the_products() -> None:
    x = torch.randn(1, 2, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        result = average_to(x, (4, 3), True)
    torch.testing.assert_close(result, F.adaptive_avg_pool2d(x, (4, 3)))


@pytest.mark.parametrize(("of_map", "size"), SIZES)
def test_a_gpu_in_deterministic_mode_never_adds_atomically(
    of_map: tuple[int, int], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map is a CPU tensor that reports a GPU's device; adaptive_avg_pool2d must not be called."""

    def forbidden(*_: object) -> Tensor:
        raise AssertionError("adaptive_avg_pool2d has a nondeterministic backward pass")

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(pooling.F, "adaptive_avg_pool2d", forbidden)
    x = torch.randn(2, 3, *of_map).as_subclass(OnGpu)
    torch.use_deterministic_algorithms(True)
    try:
        assert average_to(x, size).shape[-2:] == size
    finally:
        torch.use_deterministic_algorithms(False)
    if size[0] > of_map[0] or any(a % b for a, b in zip(of_map, size, strict=True)):
        with pytest.raises(AssertionError):
            average_to(x, size)


def test_graphs_hold_the_adaptive_pool() -> None:
    block = SkipBlock(3, 6, 5, 3).eval()
    early, later = torch.randn(1, 3, 8, 8), torch.randn(1, 5, 4, 4)
    exported = torch.export.export(block, (early, later)).module()
    traced = fx.symbolic_trace(block)
    for graph in (exported, traced):
        assert any("adaptive_avg_pool2d" in str(node.target) for node in graph.graph.nodes)
        for size in ((8, 8), (11, 9)) if graph is traced else ((8, 8),):
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(graph(x, later), block(x, later))
