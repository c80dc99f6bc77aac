"""Random features, scores, targets and maps on a device; small ones for the simulated GPU, where an element takes a
microsecond."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from biasloss_ext.ops import backends
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.native import simulated
from biasloss_ext.ops.registry import Op
from tests.calls import Call

Item = TypeVar("Item")
SHAPES = ((1, 3, 1, 1), (2, 5, 3, 3), (7, 64, 7, 7), (33, 130, 4, 4), (128, 960, 7, 7))
MAPS, CLASSES = (32, 96, 7, 7), 100  # of a step
if simulated():
    SHAPES = (*SHAPES[:-1], (5, 960, 7, 7))
    MAPS, CLASSES = (8, 24, 7, 7), 20


def make_features(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> Tensor:
    """Samples of different deviation, so that the weights of Bias Loss do not rest on the last digits."""
    generator = torch.Generator().manual_seed(sum(shape))
    deviation = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) * 1.5 + 0.5
    features = (torch.randn(shape, generator=generator) * deviation + 0.5).to(device, dtype)
    return features.contiguous(memory_format=torch.channels_last) if channels_last else features


def make_scores(
    samples: int, classes: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scores that require a gradient, and targets."""
    generator = torch.Generator().manual_seed(samples + classes)
    output = 3 * torch.randn(samples, classes, generator=generator)
    target = torch.randint(classes, (samples,), generator=generator)
    return output.to(device, dtype).requires_grad_(), target.to(device)


def drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Makes maps (N, C, H, W) of a dtype, and other values in the dtype that they are accumulated in."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = values.to(device, dtype if len(shape) == 4 else accumulation_dtype(dtype))
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    return draw


def within(spread: int) -> Callable[[int], int]:
    """Leaves sizes as they are on a GPU, and keeps them below ``spread`` on the simulated one, odd ones odd."""
    return lambda size: size if not simulated() or size < spread else spread - (spread - size) % 2


def some(items: Sequence[Item], most: int) -> Sequence[Item]:
    """All of them on a GPU, at most so many on the simulated one, from end to end."""
    if not simulated() or len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def run(op: Op, call: Call, backend: str) -> tuple[Tensor, ...]:
    outputs = call.fresh()(op, backend=backend)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def rows_apart(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Statistics and coefficients as single rows, each of a size of its own."""
    found: list[Tensor] = []
    for output in outputs:
        found += output.unbind() if output.dim() == 2 and output.shape[0] in (4, 6) else [output]
    return found


def assert_close_to_float64(op: Op, call: Call, dtype: torch.dtype, backend: str) -> None:
    """Twice the error of torch's own where that is float32 with TF32 off; a few roundings of the terms that sums are made of."""
    runs = (call.to(torch.float64), call, call.magnitudes())
    references = [rows_apart(run(op, each, "reference")) for each in runs]
    for index, (ours, exact, own, terms) in enumerate(
        zip(rows_apart(run(op, call, backend)), *references, strict=True)
    ):
        assert ours.shape == own.shape
        assert ours.dtype == own.dtype
        if not ours.numel():
            continue
        error, error_of_torch = ((t.double() - exact).abs().max().item() for t in (ours, own))
        rounding = (
            torch.finfo(ours.dtype).eps * exact.abs().max()
            + torch.finfo(accumulation_dtype(dtype)).eps * terms.abs().max()
        )
        assert error <= 2 * error_of_torch + 8 * rounding.item(), (op.name, index, error, error_of_torch)


def skip_unless_it_runs(backend: str, op: str, device: torch.device) -> None:
    reason = backends.why_not(backend, device, op)
    if reason is not None:
        pytest.skip(f"backend {backend} cannot run here: {reason}")


def assert_replays_on_new_values(op: Op, call: Call, backend: str) -> None:
    """A graph of the op sees new values at the old addresses; kernels are compiled before the capture."""
    call = call.fresh()
    run(op, call, backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(op, backend=backend)
    captured = outputs if isinstance(outputs, tuple) else (outputs,)
    next(a for a in call.arguments if isinstance(a, Tensor)).mul_(0.5)
    expected = run(op, call, backend)
    graph.replay()
    assert all(map(torch.equal, captured, expected))
