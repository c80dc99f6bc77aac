"""The pool with its variance against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.ops.pool_variance import op, reference
from tests import oracle
from tests.calls import Call
from tests.ops import map_cases
from tests.ops.map_cases import Case, channels_last, column
from tests.runnable import backends_of

BACKENDS = backends_of("pool_variance")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=map_cases.cases(), want_variance=st.booleans(), with_affine=st.booleans())
def test_forward(backend: str, case: Case, want_variance: bool, with_affine: bool) -> None:
    affine = case.affine if with_affine else None
    activation = case.activation if with_affine else 0
    call = Call((case.x,), {"affine": affine, "activation": activation, "want_variance": want_variance})
    pooled, variance = call(op.forward, backend=backend)
    h = case.x.double()
    h = map_cases.activated(h, affine.double(), case.activation) if affine is not None else h
    own, own_variance = call(reference.pool_variance)
    assert pooled.shape == case.x.shape[:2]
    assert pooled.dtype == variance.dtype == case.affine.dtype
    size = 1 + (case.affine[1].abs().max().item() if with_affine else 0)
    oracle.assert_as_close_as_torch(pooled, h.mean((2, 3)), own, size, "pooled")
    if not want_variance:
        assert variance.shape == (0,)
        return
    truth = oracle.variance(h)
    assert variance.shape == truth.shape
    oracle.assert_as_close_as_torch(variance, truth, own_variance, size, "variance")
    if not with_affine:
        torch.testing.assert_close(variance.double(), truth, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", map_cases.FLOATS)
@pytest.mark.parametrize("shape", [(3, 960, 7, 7), (2, 40, 31, 33), (5, 17, 1, 1)])
@pytest.mark.parametrize("ratio", [1, 1000])
def test_variance_far_from_zero(backend: str, dtype: torch.dtype, shape: tuple[int, ...], ratio: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(ratio), dtype=torch.float64) + ratio
    x = channels_last(x.to(dtype))
    pooled, variance = op.forward(x, want_variance=True, backend=backend)
    torch.testing.assert_close(variance.double(), oracle.variance(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(pooled.double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=map_cases.cases(), with_affine=st.booleans(), with_moments=st.booleans(), frozen=st.booleans())
def test_backward(backend: str, case: Case, with_affine: bool, with_moments: bool, frozen: bool) -> None:
    affine = case.affine if with_affine else None
    activation = case.activation if with_affine else 0
    moments = case.moments() if with_moments and with_affine else None
    pool_grad = torch.randn(case.x.shape[:2], generator=case.generator).to(case.affine.dtype)
    finish = {"moments": moments, "eps": 1e-3, "frozen": frozen}
    call = Call((pool_grad, case.x), {"affine": affine, "activation": activation, **finish})
    du, coefficients = call(op.backward, backend=backend)
    own, own_coefficients = call(reference.pool_variance_backward)

    grad, x = pool_grad.double(), case.x.double()
    identity = torch.stack((torch.ones(x.shape[1]), torch.zeros(x.shape[1]))).double()
    spread = (column(grad) / (x.shape[2] * x.shape[3])).expand(x.shape)
    truth = map_cases.gradient_at_u(spread, x, identity if affine is None else affine.double(), activation)
    error_of_u = 1 + case.affine[1].abs().max().item() / 8
    assert du.shape == x.shape
    assert du.dtype == case.x.dtype
    assert du.is_contiguous(memory_format=torch.channels_last)
    largest = truth.abs().max().item() if truth.numel() else 0.0
    narrow = du.dtype in (torch.bfloat16, torch.float16)
    # float16's subnormals are rounded to steps of 6e-8.
    oracle.assert_as_close_as_torch(du, truth, own, largest * (1 if narrow else error_of_u) + 1e-4 * narrow, "du")
    if moments is None:
        assert coefficients.shape == (0,)
        assert coefficients.dtype == case.affine.dtype
        return
    given_ = (case.affine, moments)
    map_cases.assert_coefficients(coefficients, own_coefficients, truth, x, given_, 1e-3, frozen, error_of_u)


@pytest.mark.parametrize("shape", [(1, 72, 70, 70), (3, 121, 41, 41), (5, 16, 64, 63), (16, 480, 7, 7)])
def test_does_not_depend_on_the_number_of_threads(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(shape, generator=generator))
    affine, moments = torch.rand(2, shape[1], generator=generator), torch.rand(2, shape[1], generator=generator)
    pool_grad = torch.randn(shape[:2], generator=generator)
    after = {"affine": affine, "activation": 3}

    def results() -> list[Tensor]:
        backward = op.backward.native(pool_grad, x, **after, moments=moments)
        return [*op.forward.native(x, **after, want_variance=True), *op.forward.native(x, **after), *backward]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        together = results()
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one, two)
    exact = reference.pool_variance(x.double(), affine=affine.double(), activation=3, want_variance=True)
    for one, truth in zip(alone, exact, strict=False):
        torch.testing.assert_close(one.double(), truth, rtol=1e-6, atol=1e-6)


def test_a_bad_value_stays_in_its_sample() -> None:
    x = torch.randn(3, 24, 9, 9)
    x[1, 3, 8, 8] = torch.nan  # in the incomplete last row
    pooled, variance = op.forward(channels_last(x), want_variance=True, backend="cpu")
    assert variance.isnan().tolist() == [False, True, False]
    assert pooled.isnan().nonzero().tolist() == [[1, 3]]
