"""The depthwise kernels, run by the simulator, against the reference in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cases
import depthwise_kernel_cases as dw
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biasloss_ext.ops import maps

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SETTINGS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(simulator: ModuleType, case: dw.Case, on: Any, want_moments: bool = True) -> None:
    dw.check_forward(case, *dw.simulate(simulator, case, on, want_moments))


def check_backward(simulator: ModuleType, b: dw.BackwardCase, on: Any, **wanted: bool) -> None:
    dw.check_backward(b, *dw.simulate_backward(simulator, b, on, **wanted))


def exact_activation(activation: int, dtype: torch.dtype) -> int:
    """torch's own derivative of hardsigmoid has a float32 constant in it, even in float64."""
    return maps.SIGMOID if (activation, dtype) == (maps.HARDSIGMOID, torch.float64) else activation


@st.composite
def drawn_cases(draw: st.DrawFn) -> tuple[dw.Case, dict[str, Any]]:
    shape = tuple(draw(st.integers(1, most)) for most in (3, 20, 11, 11))
    case = dw.make_case(
        shape,  # type: ignore[arg-type]
        kernel=draw(st.sampled_from([3, 5, 7])),
        stride=draw(st.sampled_from([1, 2])),
        dtype=draw(st.sampled_from(DTYPES)),
        activation=draw(st.integers(0, 6)),
        with_affine=draw(st.booleans()),
        offset=draw(st.sampled_from([0, 0, 1])),
    )
    if case.affine is None:
        case.activation = maps.IDENTITY
    case.activation = exact_activation(case.activation, case.x.dtype)
    machine = {"multiprocessors": draw(st.integers(1, 3)), "schedule": draw(st.sampled_from(cases.SCHEDULES))}
    return case, machine


@given(drawn_cases(), st.booleans())
@SETTINGS
def test_forward(simulator: ModuleType, drawn: tuple[dw.Case, dict[str, Any]], want_moments: bool) -> None:
    case, options = drawn
    check(simulator, case, dw.machine(simulator, **options), want_moments)


@given(
    drawn_cases(),
    st.fixed_dictionaries({f"with_{name}": st.booleans() for name in ("grad", "pool", "y", "y_affine", "center")}),
    st.fixed_dictionaries({"y_activation": st.integers(0, 6), "offset": st.sampled_from([0, 0, 1])}),
    st.booleans(),
    st.booleans(),
)
@SETTINGS
def test_backward(
    simulator: ModuleType,
    drawn: tuple[dw.Case, dict[str, Any]],
    given_maps: dict[str, bool],
    options: dict[str, int],
    want_x: bool,
    want_weight: bool,
) -> None:
    case, machine = drawn
    options["y_activation"] = exact_activation(options["y_activation"], case.x.dtype)
    b = dw.make_backward_case(case, **given_maps, **options)
    check_backward(simulator, b, dw.machine(simulator, **machine), want_x=want_x, want_weight=want_weight)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_tiles_and_slabs(simulator: ModuleType, dtype: torch.dtype, kernel: int, stride: int) -> None:
    """A map cut in both directions, with leftovers at every edge, and channels cut into slabs with one."""
    channels, side = (40, 13)
    case = dw.make_case((1, channels, side, side + 6), kernel, stride, dtype)
    on = dw.machine(simulator, multiprocessors=1, shared_bytes=(12 if kernel == 3 else 30) << 10)
    check(simulator, case, on)
    check_backward(simulator, dw.make_backward_case(case), on)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize(("channels", "offset"), [(8, 0), (5, 0), (8, 1)])
def test_depthwise_edges(simulator: ModuleType, kernel: int, stride: int, channels: int, offset: int) -> None:
    """Whole vectors and single elements, at every edge of the maps: what the sanitizers look at as well."""
    case = dw.make_case((2, channels, 5, 6), kernel, stride, torch.bfloat16, offset=offset)
    on = dw.machine(simulator)
    check(simulator, case, on)
    check_backward(simulator, dw.make_backward_case(case, offset=offset), on)


@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_every_depthwise_schedule(simulator: ModuleType, schedule: dict[str, Any]) -> None:
    """The same bits from every schedule, with blocks that work on several tiles."""
    case = dw.make_case((5, 8, 6, 5), 3, 1)
    b = dw.make_backward_case(case)

    def results(on: Any) -> list[torch.Tensor]:
        return [*dw.simulate(simulator, case, on), *dw.simulate_backward(simulator, b, on)]  # type: ignore[list-item]

    plain = results(dw.machine(simulator, multiprocessors=1))
    for got, want in zip(results(dw.machine(simulator, schedule, multiprocessors=1)), plain, strict=True):
        assert torch.equal(got, want)


def test_far_from_zero(simulator: ModuleType) -> None:
    """Moments and sums of maps with a mean of 100 deviations, centred by the normalisations around them."""
    case = dw.make_case((4, 6, 9, 9), 3, 1)
    case.x += 100
    case.affine[1] -= 100 * case.affine[0]  # type: ignore[index]
    on = dw.machine(simulator, multiprocessors=1)
    b = dw.make_backward_case(case)
    b.y += 100  # type: ignore[operator]
    b.y_affine[1] -= 100 * b.y_affine[0]  # type: ignore[index]
    b.y_coefficients[3] += 100  # type: ignore[index]
    b.center += 100  # type: ignore[operator]
    check_backward(simulator, b, on)
    identity = torch.zeros(6, 1, 3, 3)
    identity[:, :, 1, 1] = 1
    case.weight, case.affine, case.activation = identity, None, maps.IDENTITY
    check(simulator, case, on)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_window(simulator: ModuleType, value: float) -> None:
    case = dw.make_case((1, 4, 7, 7), 3, 1, activation=maps.RELU)
    case.x[0, 2, 3, 3] = value
    y, moments = dw.simulate(simulator, case, dw.machine(simulator))
    assert (~y.isfinite()).nonzero().tolist() == [[0, 2, i, j] for i in (2, 3, 4) for j in (2, 3, 4)]
    assert moments is not None and moments[1].isfinite().tolist() == [True, True, False, True]


def test_every_barrier_is_needed(simulator: ModuleType) -> None:
    """A copy of the kernels that lacks one of its barriers is caught: a race, or memory read before it is written."""
    case = dw.make_case((3, 8, 5, 5), 3, 1)
    b = dw.make_backward_case(case)

    def run(**schedule: Any) -> None:
        on = dw.machine(simulator, schedule, multiprocessors=1)
        dw.simulate(simulator, case, on)
        dw.simulate_backward(simulator, b, on)

    simulator.take_barriers_met()
    run()
    barriers = simulator.take_barriers_met()
    assert len(barriers) >= 8
    for barrier in sorted(barriers):
        with pytest.raises(simulator.Violation, match=r"race|uninitialised"):
            run(seed=1, skipped_barrier=barrier)
