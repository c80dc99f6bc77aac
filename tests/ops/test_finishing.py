"""The ops that finish a batch normalization: statistics with the running ones, and coefficients, by `F.batch_norm` in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.registry import OPS
from tests import norm_cases
from tests.calls import Call, in_a_tuple
from tests.ops import samples

FINISHES_STATISTICS = {n for n, op in OPS.items() if "running_mean" in str(op.native._schema)}
FINISHES_COEFFICIENTS = {n for n, op in OPS.items() if "bool frozen" in str(op.native._schema)}
OF_MAPS = [run for run in samples.runs() if run[0] in FINISHES_STATISTICS - {"batch_norm_affine"}]


def call_of(name: str, dtype: torch.dtype) -> Call:
    """With everything given, and the running statistics among it."""
    call = samples.of(name, dtype)[0]
    assert call.options["running_mean"] is not None
    return call


def map_and_statistics(name: str, call: Call, backend: str) -> tuple[Tensor, Tensor]:
    outputs = in_a_tuple(call(OPS[name], backend=backend))
    return (call.arguments[0], outputs[0]) if len(outputs) == 1 else (outputs[0], outputs[1])


def norm_of(call: Call) -> dict[str, Any]:
    names = ("norm_weight", "norm_bias", "running_mean", "running_var", "num_batches_tracked", "momentum", "eps")
    return {name: call.options[name] for name in names}


def test_ops_that_finish_are_found() -> None:
    assert {"depthwise", "expand_depthwise", "pointwise", "batch_norm_statistics"} <= FINISHES_STATISTICS
    assert {"depthwise_backward", "pointwise_backward", "batch_norm_coefficients"} <= FINISHES_COEFFICIENTS
    assert set(DU) == FINISHES_COEFFICIENTS


@pytest.mark.parametrize(("name", "backend"), OF_MAPS)
@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_statistics_with_each_of_their_options_or_none(name: str, backend: str, dtype: torch.dtype) -> None:
    call = call_of(name, dtype)
    every = list(norm_cases.subsets(norm_of(call)))
    # What is left out is decided alike for every dtype.
    for options in every if dtype == torch.float32 else (every[0], every[-1]):
        called = call.but(**options).fresh()
        y, statistics = map_and_statistics(name, called, backend)
        norm_cases.check_statistics(statistics, y, options, called.options)


@pytest.mark.parametrize(("name", "backend"), OF_MAPS)
@pytest.mark.parametrize(("momentum", "eps"), [(0.0, 1e-5), (1.0, 1e-5), (0.01, 0.5)])
def test_momentum_and_eps(name: str, backend: str, momentum: float, eps: float) -> None:
    call = call_of(name, torch.float32).but(momentum=momentum, eps=eps)
    called = call.fresh()
    y, statistics = map_and_statistics(name, called, backend)
    norm_cases.check_statistics(statistics, y, norm_of(call), called.options)
    if momentum == 0:
        for written in ("running_mean", "running_var"):
            assert torch.equal(called.options[written], call.options[written])


@pytest.mark.parametrize(("name", "backend"), OF_MAPS)
def test_an_empty_batch_counts_and_moves_nothing(name: str, backend: str) -> None:
    call = call_of(name, torch.float32)
    empty = call.map(lambda t: maps.channels_last(t[:0]) if t.dim() == 4 and t.shape[0] == samples.SAMPLES else t)
    if "gate" in empty.options:
        empty = empty.but(gate=call.options["gate"][:0])
    called = empty.fresh()
    y, statistics = map_and_statistics(name, called, backend)
    assert y.shape[0] == 0
    norm_cases.check_statistics(statistics, y, norm_of(call), called.options)


@pytest.mark.parametrize(("name", "backend"), OF_MAPS)
def test_what_is_not_wanted_moves_nothing(name: str, backend: str) -> None:
    if name == "batch_norm_statistics":  # has nothing else to give
        return
    call = call_of(name, torch.float32).but(want_statistics=False)
    called = call.fresh()
    _, statistics = map_and_statistics(name, called, backend)
    assert statistics.shape == (0,)
    for written in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(called.options[written], call.options[written])


@pytest.mark.parametrize(("name", "backend"), [run for run in samples.runs() if run[0] == "batch_norm_affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_of_given_moments(name: str, backend: str, dtype: torch.dtype) -> None:
    y = maps.channels_last(torch.randn(3, 37, 5, 4, generator=torch.Generator().manual_seed(1)).to(dtype) + 2)
    moments = maps.moments_of(y)
    options = norm_cases.drawn(37, dtype, torch.Generator().manual_seed(2))
    for chosen in norm_cases.subsets(options):
        called = Call((moments, 60), chosen).fresh()
        statistics = called(OPS[name], backend=backend)
        assert torch.equal(statistics[:2], moments)
        norm_cases.check_statistics(statistics, y, chosen, called.options)
    called = Call((torch.zeros_like(moments), 0), options).fresh()
    statistics = called(OPS[name], backend=backend)
    norm_cases.check_running(statistics, None, 0, options, called.options)


def _du_of_norm(call: Call, _: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    grad, y, affine, _ = call.arguments
    return grad.double() * slope(y, affine, call.options.get("activation", 0)), y


def _du_of_pointwise(call: Call, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    x = call.arguments[1]
    return outputs[0].double() * slope(x, call.options["affine"], call.options["activation"]), x


def _du_of_depthwise(call: Call, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return outputs[0], call.arguments[0]


def _du_of_pool(call: Call, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return outputs[0], call.arguments[1]


def _du_of_expansion(call: Call, _: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """By autograd through the plain layers, since the op gives du to nobody."""
    x, _, expand_weight, affine, _, weight, y, y_affine, y_coefficients = (t.double() for t in call.arguments)
    options = call.to(torch.float64).options
    y1 = torch.nn.functional.conv2d(x, expand_weight)
    u = (y1 * maps.per_channel(affine[0]) + maps.per_channel(affine[1])).requires_grad_()
    h = maps.activate(u, options["activation"])
    out = torch.nn.functional.conv2d(h, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    dh = options["grad"] + maps.per_channel(options["pool_grad"]) / (y.shape[2] * y.shape[3])
    dy = maps.gradient_behind_norm(dh * slope(y, y_affine, options["y_activation"]), y, y_coefficients)
    return torch.autograd.grad(out, u, dy)[0], y1


def slope(x: Tensor, affine: Tensor, activation: int) -> Tensor:
    return maps.derivative(maps.normalized(x.double(), affine.double()), activation)


DU: dict[str, Any] = {
    "batch_norm_coefficients": _du_of_norm,
    "pointwise_backward": _du_of_pointwise,
    "depthwise_backward": _du_of_depthwise,
    "expand_depthwise_backward": _du_of_expansion,
    "pool_variance_backward": _du_of_pool,
    "squeeze_excite_backward": None,  # from sums by sample: `test_a_gate_between` below
}


@pytest.mark.parametrize(("name", "backend"), [run for run in samples.runs() if DU.get(run[0]) is not None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_are_those_of_autograd(name: str, backend: str, dtype: torch.dtype) -> None:
    checked = set()
    for call in samples.of(name, dtype):
        outputs = in_a_tuple(call(OPS[name], backend=backend))
        coefficients, frozen = outputs[-1], call.options.get("frozen", False)
        if coefficients.numel() == 0 or "eps" not in call.options:
            continue
        checked.add(frozen)
        du, y = DU[name](call, outputs)
        check_coefficients(coefficients, du, y, call, frozen)
    assert checked == {True, False}


def check_coefficients(coefficients: Tensor, du: Tensor, y: Tensor, call: Call, frozen: bool) -> None:
    """With the weight that the affine was made of."""
    affine = call.options.get("affine")
    affine = call.arguments[3 if len(call.arguments) > 5 else 2] if affine is None else affine
    eps = call.options["eps"]
    weight = affine[0].double() * (maps.moments_of(y.double())[1] + eps).sqrt()
    norm_cases.check_coefficients(coefficients, du, y, weight, eps, frozen)


WITH_A_GATE = [backend for name, backend in samples.runs() if name == "squeeze_excite_backward"]


@pytest.mark.parametrize("backend", WITH_A_GATE)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gate_between(backend: str, frozen: bool, dtype: torch.dtype) -> None:
    """The sums of pointwise_backward, finished by squeeze_excite_backward once the gradient of the pool is known."""
    gate = samples.of("squeeze_excite_backward", dtype)[0]
    product = samples.of("pointwise_backward", dtype)[0]
    x, affine, moments = product.arguments[1], product.options["affine"], product.options["moments"]
    dh, _, gate_grad, sums, empty = product(OPS["pointwise_backward"], backend=backend)
    assert empty.shape == (0,)
    positions = x.shape[2] * x.shape[3]
    given = gate.but({0: gate_grad}, sums=sums, affine=affine, moments=moments, positions=positions, frozen=frozen)
    pool_grad, *_, coefficients = given(OPS["squeeze_excite_backward"], backend=backend)
    at_map = dh.double() + maps.per_channel(pool_grad.double()) / positions
    du = at_map * slope(x, affine, product.options["activation"])
    check_coefficients(coefficients, du, x, product, frozen)
    assert coefficients.dtype == accumulation_dtype(dtype)
