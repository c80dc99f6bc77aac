"""Per-sample variance: accuracy far from zero, layouts, dtypes, edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biasloss_ext import feature_variance
from tests import oracle
from tests.runnable import backends_of

BACKENDS = backends_of("feature_variance")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ratio", [0, 1, 30, 1000])
@pytest.mark.parametrize("shape", [(3, 960, 7, 7), (2, 40001), (50, 17), (50, 3)])
def test_error_below_1e5_far_from_zero(backend: str, dtype: torch.dtype, ratio: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(ratio)
    features = (torch.randn(shape, dtype=torch.float64) + ratio).to(dtype)
    truth = oracle.variance(features)
    torch.testing.assert_close(feature_variance(features, backend=backend).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 3), (torch.bfloat16, 16), (torch.float16, 16)])
@pytest.mark.parametrize("ratio", [3, 1000])
def test_rounding_does_not_pile_up_on_the_cpu(dtype: torch.dtype, roundings: int, ratio: int) -> None:
    """Neither where parts of a sample are merged, nor where few distinct values are rounded alike many times over."""
    torch.manual_seed(0)
    features = (torch.randn(64, 960, 7, 7) + ratio).to(dtype)
    rtol = roundings * torch.finfo(torch.float32).eps
    ours = feature_variance(features, backend="cpu").double()
    torch.testing.assert_close(ours, oracle.variance(features), rtol=rtol, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["first", "last", "spike", "halves", "ramp"])
def test_error_below_1e5_with_outliers(backend: str, place: str) -> None:
    """Outliers where a shift by early elements would be worst."""
    torch.manual_seed(0)
    features = torch.randn(2, 30000) + 1000
    if place == "first":
        features[:, :70] = 0
    elif place == "last":
        features[:, -70:] = 0
    elif place == "spike":
        features[:, 0] = -1e6
    elif place == "halves":
        features[:, 15000:] -= 2000
    else:
        features += torch.linspace(0, 1e4, 30000)
    truth = oracle.variance(features)
    torch.testing.assert_close(feature_variance(features, backend=backend).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    samples=st.integers(0, 5),
    permutation=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
    sliced=st.booleans(),
)
def test_layouts(backend, dtype, shape, samples, permutation, seed, sliced) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(shape) + 1))
    permutation.shuffle(order)
    generator = torch.Generator().manual_seed(seed)
    size = [samples, *shape]
    stored = torch.randn([size[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
    features = stored.permute([order.index(d) for d in range(len(size))])
    if sliced and shape:
        features = torch.cat((features, features * 0 + 77), -1)[..., : shape[-1]]
    assert list(features.shape) == size
    truth = oracle.variance(features)
    ours = feature_variance(features, backend=backend)
    assert ours.shape == (samples,)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edge_cases(backend: str) -> None:
    assert feature_variance(torch.tensor([[3.0], [4.0]]), backend=backend).tolist() == [0.0, 0.0]
    assert feature_variance(torch.tensor([3.0, 4.0]), backend=backend).tolist() == [0.0, 0.0]
    assert feature_variance(torch.full((2, 5000), 1e4), backend=backend).tolist() == [0.0, 0.0]
    assert feature_variance(torch.zeros(0, 4, 2, 2), backend=backend).shape == (0,)
    for bad in (math.nan, math.inf, -math.inf):
        features = torch.randn(3, 20000)
        features[1, 12345] = bad
        assert feature_variance(features, backend=backend).isnan().tolist() == [False, True, False]
        assert feature_variance(torch.tensor([[bad]]), backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_and_16_bit_range(backend: str) -> None:
    features = torch.randn(4, 100, requires_grad=True)
    assert not feature_variance(features, backend=backend).requires_grad
    wide = (torch.randn(2, 1000) * 20000).clamp(-65000, 65000).half()  # squares far beyond float16
    torch.testing.assert_close(
        feature_variance(wide, backend=backend).double(), oracle.variance(wide), rtol=1e-5, atol=0
    )


def test_does_not_depend_on_the_number_of_threads() -> None:
    features = torch.randn(7, 300, 16, 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = feature_variance(features, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, feature_variance(features, backend="cpu"))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"features must be float16, bfloat16, float32 or float64, got torch\.int64"):
        feature_variance(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="features must be a tensor, got list"):
        feature_variance([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least one activation per sample, got shape \(2, 0\)"):
        feature_variance(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="without dimensions"):
        feature_variance(torch.tensor(1.0))
    with pytest.raises(ValueError, match="unknown backend 'fast'; there are: auto, reference, cpu, cuda, triton"):
        feature_variance(torch.zeros(2, 3), backend="fast")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: it runs on CUDA tensors, not on cpu"):
        feature_variance(torch.zeros(2, 3), backend="cuda")
