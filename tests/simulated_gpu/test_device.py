"""What the simulated GPU refuses, as a GPU would, and how the package takes it for one."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from biasloss_ext import functional
from biasloss_ext.info import report
from biasloss_ext.ops import backends
from biasloss_ext.ops.registry import OPS
from tests.cudasim.simulated_gpu import Simulator
from tests.ops import samples
from tests.simulated_gpu import loss_cases

CPU, META = torch.device("cpu"), torch.device("meta")
OPS_ON_CUDA = [name for name, op in OPS.items() if "cuda" in op.backends]


@pytest.mark.parametrize("name", OPS_ON_CUDA)
def test_launches_are_captured(simulator: Simulator, name: str) -> None:
    """Nothing that a capture refuses is called on the way to a launch, also where it is the first one."""
    with simulator.using(capturing=1):
        for call in samples.of(name):
            call.fresh()(OPS[name], backend="cuda")
    launches = simulator.take_launches()
    assert launches
    assert all(launch.captured for launch in launches)


def test_captured_launches_share_no_ticket_with_eager_ones(simulator: Simulator) -> None:
    features = loss_cases.features(3, 9000)
    before = functional.feature_variance(features, backend="cuda")
    with simulator.using(capturing=1):
        captured = functional.feature_variance(features, backend="cuda")
    assert torch.equal(before, captured)
    assert torch.equal(before, functional.feature_variance(features, backend="cuda"))


INVALID_VALUE, INVALID_CONFIGURATION = 1, 9


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes", "error"),
    [
        ((1, 1, 1), 1024, 49152, 0),
        ((70000, 1, 1), 1, 0, 0),
        ((0, 1, 1), 32, 0, INVALID_CONFIGURATION),
        ((1, 65536, 1), 32, 0, INVALID_CONFIGURATION),
        ((1, 1, 65536), 32, 0, INVALID_CONFIGURATION),
        ((2**31, 1, 1), 32, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), 0, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), 1025, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), 32, 49153, INVALID_VALUE),
    ],
)
def test_launches_beyond_the_limits_are_refused(
    simulator: Simulator, grid: tuple[int, int, int], threads: int, shared_bytes: int, error: int
) -> None:
    assert simulator.library.biasloss_simulator_try_launch(*map(ctypes.c_uint, (*grid, threads, shared_bytes))) == error


def test_static_and_dynamic_shared_memory_have_one_limit(simulator: Simulator) -> None:
    """48 KiB, without asking; 227 KiB otherwise. The kernel has 32 KiB of static memory."""
    kib = 1024
    attempt = simulator.library.biasloss_simulator_try_shared
    assert attempt(16 * kib, 0) == 0
    assert attempt(17 * kib, 0) == -1
    assert attempt(100 * kib, 100 * kib) == 0
    assert attempt(101 * kib, 100 * kib) == INVALID_VALUE
    assert attempt(0, 228 * kib) == INVALID_VALUE
    assert attempt(200 * kib, 200 * kib) == -1


def test_what_a_capture_refuses(simulator: Simulator) -> None:
    assert simulator.library.biasloss_simulator_try_capture() == 0
    with simulator.using(capturing=1):
        assert simulator.library.biasloss_simulator_try_capture() == 5


def positions_of_tensors(name: str) -> list[tuple[int | str, str]]:
    """Where the first sample of an op has tensors besides the first, and what the schema calls them."""
    call = samples.of(name)[0]
    names = [argument.name for argument in OPS[name].native._schema.arguments]
    found: list[tuple[int | str, str]] = [(i, names[i]) for i, t in enumerate(call.arguments) if isinstance(t, Tensor)]
    found += [(key, key) for key, t in call.options.items() if isinstance(t, Tensor)]
    return found


@pytest.mark.parametrize("name", OPS_ON_CUDA)
def test_tensors_of_another_device_are_refused_by_name(name: str) -> None:
    """A kernel would read another device's memory. Past the dispatcher, which takes a meta tensor for a tracing call."""
    call, op = samples.of(name)[0], OPS[name]
    first, *others = sorted(positions_of_tensors(name), key=lambda found: schema_position(name, found[1]))
    assert others or name == "feature_variance"
    for position, called in others:
        moved = call.map(lambda t: t)
        if isinstance(position, int):
            moved = moved.but({position: moved.arguments[position].to(META)})
        else:
            moved = moved.but(**{position: moved.options[position].to(META)})
        message = f"{name}: expected all tensors on one device, got {first[1]} on cpu and {called} on meta"
        with pytest.raises(RuntimeError, match=message):
            op.native.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *moved.arguments, **moved.options)


def schema_position(name: str, argument: str) -> int:
    return [a.name for a in OPS[name].native._schema.arguments].index(argument)


def test_cpu_tensors_stand_for_a_gpu() -> None:
    assert backends.choose("auto", CPU, "bias_loss") == "cuda"
    assert backends.choose("auto", CPU, "depthwise") == "cuda"
    assert backends.choose("auto", CPU, "expand_depthwise") == "reference"
    assert backends.choose("cuda", CPU, "feature_variance") == "cuda"
    with pytest.raises(RuntimeError, match="'cpu' cannot run here: CPU tensors stand in for a GPU's in this process"):
        backends.choose("cpu", CPU, "depthwise")
    with pytest.raises(
        RuntimeError, match="it runs on CPU tensors, which stand in for a GPU's in this process, not on meta"
    ):
        backends.choose("cuda", META)
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: pointwise has no cuda kernels"):
        backends.choose("cuda", CPU, "pointwise")
    assert "simulated GPU: " in report()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_weighs_nan(bad: float, reduction: str) -> None:
    """Whatever alpha and beta: the weights are not computed from it."""
    for alpha in (0.3, 0.0):
        case = loss_cases.one_row(alpha=alpha, reduction=reduction)
        case.features[3, 17] = bad
        loss, weight, gradient, moved = loss_cases.run(case)
        assert loss.isnan().all()
        assert weight.isnan().all()
        assert gradient.isnan().all()
        assert moved == case.running_min
