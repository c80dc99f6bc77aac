"""Blocks and threads in any order: the same bits, and no barrier that could go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from biasloss_ext import functional
from biasloss_ext.ops import maps
from biasloss_ext.ops.registry import OPS
from tests.calls import in_a_tuple
from tests.cudasim.simulated_gpu import Simulator
from tests.ops import samples
from tests.simulated_gpu import loss_cases

# Threads in order; in random order with one, two and four blocks side by side.
SCHEDULES: list[dict[str, int]] = [
    {"seed": 0},
    {"seed": 1, "resident_blocks": 1},
    {"seed": 2},
    {"seed": 3, "resident_blocks": 4},
]
OPS_ON_CUDA = [name for name, op in OPS.items() if "cuda" in op.backends]


def depthwise_maps(shape: tuple[int, int, int, int] = (5, 8, 6, 5)) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """By default blocks that work on several tiles."""
    channels = shape[1]

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        return maps.channels_last(values) if len(shape) == 4 and shape[1] > 1 else values

    x, weight, affine = drawn(*shape), drawn(channels, 1, 3, 3), drawn(2, channels)
    moments = torch.stack((drawn(channels), drawn(channels).square() + 1))
    options = {"affine": affine, "activation": maps.HARDSWISH, "backend": "cuda"}
    after = {"grad": drawn(*shape), "y": drawn(*shape)}
    after |= {"y_coefficients": drawn(6, channels), "y_affine": drawn(2, channels)}
    return {
        "depthwise": lambda: in_a_tuple(OPS["depthwise"](x, weight, want_statistics=True, **options)),
        "depthwise_backward": lambda: in_a_tuple(
            OPS["depthwise_backward"](x, weight, moments=moments, y_activation=maps.RELU6, **after, **options)
        ),
    }


def runs() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    found: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for name in OPS_ON_CUDA:
        calls = samples.of(name)

        def every_call(name: str = name, calls: list[Any] = calls) -> tuple[Tensor, ...]:
            return tuple(t for call in calls for t in in_a_tuple(call.fresh()(OPS[name], backend="cuda")))

        found[f"samples of {name}"] = every_call
    for dtype in (torch.float32, torch.bfloat16):
        for make in (loss_cases.one_row, loss_cases.dense):
            found[f"{make.__name__} {dtype}"] = lambda make=make, dtype=dtype: loss_cases.run(make(dtype))
    features = loss_cases.features(3, 20000)
    found["feature_variance"] = lambda: (functional.feature_variance(features, backend="cuda"),)
    return {**found, **depthwise_maps()}


RUNS = runs()


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bits_from_every_schedule(simulator: Simulator, name: str) -> None:
    results = []
    for schedule in SCHEDULES:
        with simulator.using(multiprocessors=1, **schedule):
            results.append(RUNS[name]())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.fixture
def stale_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def missed(simulator: Simulator, run: Callable[[], tuple[Tensor, ...]], barrier: str) -> bool:
    """Whether some schedule shows that this barrier is missing: by a race, or by another result."""
    right = run()
    for seed in range(1, 30):
        with simulator.using(multiprocessors=1, seed=seed, resident_blocks=4, skipped_barrier=barrier):
            try:
                found = run()
            except RuntimeError as error:
                if "race" in str(error) or "uninitialized" in str(error):
                    return True
                raise
        if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
            return True
    return False


def losses() -> tuple[Tensor, ...]:
    """Forward and backward, with every sum that a block can have to form."""
    case = loss_cases.one_row(number_of_classes=2500, label_smoothing=0.1)
    of_classes = loss_cases.run(case)
    case.target = case.output.softmax(1)
    return *of_classes, *loss_cases.run(case)


def depthwise(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Both directions."""
    forward, backward = depthwise_maps(shape).values()  # type: ignore[arg-type]
    return lambda: (*forward(), *backward())


# By runs of which one must miss it; and how many barriers there are at least.
BARRIERS: dict[str, tuple[tuple[Callable[[], tuple[Tensor, ...]], ...], int]] = {
    "loss": ((losses,), 4),
    "variance": ((RUNS["feature_variance"],), 2),
    # Several blocks a slab; and so many slabs that a block finishes more than one.
    "depthwise": ((depthwise(9, 8, 3, 3), depthwise(1, 4400, 2, 2)), 8),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_no_barrier_can_go(simulator: Simulator, stale_memory_is_nan: None, name: str) -> None:
    """Takes them away one at a time: every one is missed."""
    runs, fewest = BARRIERS[name]
    with simulator.using(multiprocessors=1):
        for run in runs:
            run()
    barriers = simulator.take_barriers()
    assert len(barriers) >= fewest
    unneeded = [barrier for barrier in barriers if not any(missed(simulator, run, barrier) for run in runs)]
    assert unneeded == []
