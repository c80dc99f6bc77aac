"""The pieces of batch normalisation against float64."""

from __future__ import annotations

import map_cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_cases import Case, channels_last, column
from torch import Tensor

from biasloss_ext.ops.batch_norm import op, reference

BACKENDS = ("cpu", "reference")
CPU = torch.device("cpu")


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
    moments = op.moments(case.x, device=CPU, backend=backend)
    assert moments.dtype == case.affine.dtype
    assert moments.shape == (2, case.x.shape[1])
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
    moments = op.moments(y, device=CPU, backend=backend)
    torch.testing.assert_close(moments[1].double(), y.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=map_cases.cases(), with_residual=st.booleans())
def test_apply(backend: str, case: Case, with_residual: bool) -> None:
    residual = case.map_like() if with_residual else None
    arguments = (case.x, case.affine, case.activation, residual)
    ours = op.apply(*arguments, device=CPU, backend=backend)
    truth = map_cases.activated(case.x.double(), case.affine.double(), case.activation)
    truth = truth if residual is None else truth + residual.double()
    own = reference.batch_norm_apply(*arguments)
    scale = 4.0 if ours.dtype in (torch.bfloat16, torch.float16) else (1 + case.affine[1].abs().max().item())
    check(ours, truth, own, scale, "apply")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=map_cases.cases())
def test_sums_and_backward(backend: str, case: Case) -> None:
    grad, coefficients = case.map_like(), case.per_channel(4)
    coefficients[3] = case.center
    exact_grad, exact_x, exact_affine, a = map_cases.wide(grad, case.x, case.affine, coefficients)
    du = map_cases.gradient_at_u(exact_grad, exact_x, exact_affine, case.activation)

    arguments = (grad, case.x, case.affine, case.center, case.activation)
    ours = op.sums(*arguments, device=CPU, backend=backend)
    # Rounded like a few terms, each with the error of u in it: mean / std roundings.
    error_of_u = 1 + case.affine[1].abs().max().item() / 8
    terms = map_cases.sums(du.abs(), exact_x, a[3]).abs().max() + du.abs().sum((0, 2, 3)).max() * 0.1
    terms = terms + (du * (exact_x - column(a[3]))).abs().sum((0, 2, 3)).max()
    own = reference.batch_norm_sums(*arguments)
    check(ours, map_cases.sums(du, exact_x, a[3]), own, error_of_u * terms.item(), "sums")

    arguments = (grad, case.x, case.affine, coefficients, case.activation)
    ours = op.backward(*arguments, device=CPU, backend=backend)
    truth = column(a[0]) * du + column(a[1]) * (exact_x - column(a[3])) + column(a[2])
    own = reference.batch_norm_backward(*arguments)
    narrow = ours.dtype in (torch.bfloat16, torch.float16)
    check(ours, truth, own, 1.0 if narrow else error_of_u * 8, "backward")


# Enough for two threads, channels that fill vectors and that do not, a tail.
LARGE = ((2, 72, 45, 45), (3, 121, 31, 30), (1, 16, 150, 111))


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_not_depend_on_the_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y, grad, residual = (channels_last(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3))
    affine, coefficients = torch.rand(2, shape[1], generator=generator), torch.rand(4, shape[1], generator=generator)

    def results() -> list[Tensor]:
        return [
            op.moments.native(y),
            op.apply.native(y, affine, 3, residual),
            op.sums.native(grad, y, affine, coefficients[3].contiguous(), 3),
            op.backward.native(grad, y, affine, coefficients, 3),
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
            reference.batch_norm_moments(y.double()),
            reference.batch_norm_apply(y.double(), affine, 3, residual),
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


def test_opcheck() -> None:
    y, grad = (channels_last(torch.randn(2, 5, 3, 4)) for _ in range(2))
    affine, coefficients = torch.rand(2, 5), torch.rand(4, 5)
    torch.library.opcheck(op.moments.native, (y,))
    torch.library.opcheck(op.apply.native, (y, affine, 3, None))
    torch.library.opcheck(op.apply.native, (y, affine, 3, grad))
    torch.library.opcheck(op.sums.native, (grad, y, affine, affine[0], 3))
    torch.library.opcheck(op.backward.native, (grad, y, affine, coefficients, 3))
    torch.library.opcheck(op.affine.native, (affine, affine[0], None, 1e-5))
    torch.library.opcheck(op.coefficients.native, (affine, affine, affine, 1e-5, 24, False))


def test_bad_input() -> None:
    y, affine = channels_last(torch.randn(2, 5, 3, 4)), torch.rand(2, 5)
    with pytest.raises(RuntimeError, match="y: expected a dense channels_last map"):
        op.apply.native(y.contiguous(), affine, 0, None)
    with pytest.raises(RuntimeError, match="residual: expected the shape and dtype of y"):
        op.apply.native(y, affine, 0, y[:1])
    with pytest.raises(RuntimeError, match="affine: expected 10 contiguous values, got 5"):
        op.apply.native(y, affine[:1], 0, None)
    with pytest.raises(RuntimeError, match="affine: expected float32 values"):
        op.apply.native(y, affine.double(), 0, None)
