"""The pieces of batch normalization against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.ops.batch_norm import op, reference
from tests import norm_cases, oracle
from tests.calls import Call
from tests.ops import map_cases
from tests.ops.map_cases import Case, channels_last, column
from tests.runnable import backends_of

BACKENDS = backends_of("batch_norm_apply")


def check(ours: Tensor, truth: Tensor, own: Tensor, scale: float, what: str) -> None:
    assert ours.shape == truth.shape
    assert ours.dtype == own.dtype
    if ours.dim() == 4:
        assert ours.is_contiguous(memory_format=torch.channels_last)
    oracle.assert_as_close_as_torch(ours, truth, own, scale, what)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=map_cases.cases(ratio=(0, 3, 100, 1000)))
def test_moments(backend: str, case: Case) -> None:
    options = norm_cases.drawn(case.x.shape[1], case.x.dtype, case.generator)
    call = Call((case.x,), options).fresh()
    statistics = call(op.statistics, backend=backend)
    norm_cases.check_statistics(statistics, case.x, options, call.options)
    moments = statistics[:2]
    assert moments.dtype == case.affine.dtype
    if case.x.numel() == 0:
        assert not moments.any()
        return
    exact = case.x.double()
    mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    rounding = torch.finfo(moments.dtype).eps
    # In float64 the yardstick is rounded as much as what it measures.
    roundings = 16 if moments.dtype == torch.float64 else 2
    torch.testing.assert_close(moments[0].double(), mean, rtol=roundings * rounding, atol=roundings * rounding)
    # The reference takes its squares about a mean that is rounded.
    of_rounded_mean = (mean.abs().max().item() * rounding) ** 2 if backend == "reference" else 0.0
    torch.testing.assert_close(
        moments[1].double(),
        var,
        rtol=1e-11 if moments.dtype == torch.float64 else 1e-5,
        atol=1e-12 + of_rounded_mean,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["first", "last", "ramp"])
def test_moments_with_outliers(backend: str, place: str) -> None:
    """Outliers where a shift by early elements would be worst."""
    y = torch.randn(2, 24, 61, 61, generator=torch.Generator().manual_seed(0)) + 1000
    if place == "first":
        y[0, :, 0] = 0
    elif place == "last":
        y[1, :, -1] = 0
    else:
        y += torch.linspace(0, 1e4, 61)[:, None]
    y = channels_last(y)
    moments = op.statistics(y, backend=backend)[:2]
    torch.testing.assert_close(moments[1].double(), y.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=map_cases.cases(), with_residual=st.booleans())
def test_apply(backend: str, case: Case, with_residual: bool) -> None:
    residual = case.map_like() if with_residual else None
    call = Call((case.x, case.affine), {"activation": case.activation, "residual": residual})
    ours = call(op.apply, backend=backend)
    truth = map_cases.activated(case.x.double(), case.affine.double(), case.activation)
    truth = truth if residual is None else truth + residual.double()
    own = call(reference.batch_norm_apply)
    scale = 4.0 if ours.dtype in (torch.bfloat16, torch.float16) else (1 + case.affine[1].abs().max().item())
    check(ours, truth, own, scale, "apply")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=map_cases.cases(), frozen=st.booleans(), eps=st.sampled_from((1e-5, 0.1)))
def test_coefficients_and_backward(backend: str, case: Case, frozen: bool, eps: float) -> None:
    grad, coefficients, moments = case.map_like(), case.per_channel(6), case.moments()
    coefficients[3] = case.center
    exact_grad, exact_x, exact_affine, a = map_cases.wide(grad, case.x, case.affine, coefficients)
    du = map_cases.gradient_at_u(exact_grad, exact_x, exact_affine, case.activation)

    options = {"activation": case.activation, "eps": eps, "frozen": frozen}
    call = Call((grad, case.x, case.affine, moments), options)
    ours, own = call(op.coefficients, backend=backend), call(reference.batch_norm_coefficients)
    # Rounded like a few terms, each with the error of u in it: mean / std roundings.
    error_of_u = 1 + case.affine[1].abs().max().item() / 8
    map_cases.assert_coefficients(ours, own, du, exact_x, (case.affine, moments), eps, frozen, error_of_u)

    call = Call((grad, case.x, case.affine, coefficients), {"activation": case.activation})
    ours = call(op.backward, backend=backend)
    truth = column(a[0]) * du + column(a[1]) * (exact_x - column(a[3])) + column(a[2])
    own = call(reference.batch_norm_backward)
    narrow = ours.dtype in (torch.bfloat16, torch.float16)
    check(ours, truth, own, 1.0 if narrow else error_of_u * 8, "backward")


# Enough for two threads, channels that fill vectors and that do not, a tail.
LARGE = ((2, 72, 45, 45), (3, 121, 31, 30), (1, 16, 150, 111))


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_not_depend_on_the_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y, grad, residual = (channels_last(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3))
    affine, moments = torch.rand(2, shape[1], generator=generator), torch.rand(2, shape[1], generator=generator)
    coefficients = torch.rand(6, shape[1], generator=generator)

    def results() -> list[Tensor]:
        return [
            op.statistics.native(y),
            op.apply.native(y, affine, activation=3, residual=residual),
            op.coefficients.native(grad, y, affine, moments, activation=3),
            op.backward.native(grad, y, affine, coefficients, activation=3),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        together = results()
    finally:
        torch.set_num_threads(threads)
    for one, two, truth in zip(
        alone,
        together,
        (
            reference.batch_norm_statistics(y.double()),
            reference.batch_norm_apply(y.double(), affine, activation=3, residual=residual),
            None,
            None,
        ),
        strict=True,
    ):
        assert torch.equal(one, two)
        if truth is not None:
            torch.testing.assert_close(
                one.double(), truth, rtol=8e-3 if one.dtype == dtype != truth.dtype else 1e-5, atol=1e-2
            )


def test_bad_input() -> None:
    y, affine = channels_last(torch.randn(2, 5, 3, 4)), torch.rand(2, 5)
    with pytest.raises(RuntimeError, match="y: expected a dense channels_last map"):
        op.apply.native(y.contiguous(), affine)
    with pytest.raises(RuntimeError, match="residual: expected the shape and dtype of y"):
        op.apply.native(y, affine, residual=y[:1])
    with pytest.raises(RuntimeError, match="affine: expected 10 contiguous values, got 5"):
        op.apply.native(y, affine[:1])
    with pytest.raises(RuntimeError, match="affine: expected float32 values"):
        op.apply.native(y, affine.double())
