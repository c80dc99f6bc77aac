"""The variance kernel, run by the simulator, against float64."""

from __future__ import annotations

from types import ModuleType

import cases
import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def run(simulator: ModuleType, features: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    schedule = simulator.Schedule(**options.pop("schedule", {}))  # type: ignore[arg-type]
    options.setdefault("multiprocessors", 4)
    variance, extrema = simulator.feature_variance(
        cases.as_array(features), dtype=cases.NAMES[features.dtype], schedule=schedule, **options
    )
    return torch.from_numpy(variance), torch.from_numpy(extrema)


def check(features: torch.Tensor, variance: torch.Tensor, extrema: torch.Tensor) -> None:
    want = features.double().var(dim=1)
    relative = 1e-12 if features.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(variance.double(), want, rtol=relative, atol=0)
    assert extrema.tolist() == [-variance.min().item(), variance.max().item()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_every_schedule(simulator: ModuleType, dtype: torch.dtype, schedule: dict) -> None:
    features = cases.features(3, 5000, dtype)
    check(features, *run(simulator, features, schedule=schedule))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("activations", [1, 2, 7, 8, 9, 31, 255, 1025, 4099])
def test_every_alignment_and_length(simulator: ModuleType, dtype: torch.dtype, offset: int, activations: int) -> None:
    """Samples that start anywhere, at any distance: the stride is odd, so that every one is aligned differently."""
    storage = torch.full((offset + 3 * (activations + 5),), torch.nan, dtype=dtype)
    view = storage[offset:].as_strided((3, activations), (activations + 4 + activations % 2, 1))
    view.copy_(cases.features(3, activations, dtype))
    variance, extrema = run(simulator, view)
    if activations == 1:
        assert variance.tolist() == [0, 0, 0] and extrema.tolist() == [0, 0]
    else:
        check(view, variance, extrema)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("mean_over_deviation", [1, 30, 1000])
@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_error_far_from_zero(
    simulator: ModuleType, dtype: torch.dtype, mean_over_deviation: int, multiprocessors: int
) -> None:
    noise = torch.randn(2, 20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = (noise + mean_over_deviation).to(dtype)
    variance, _ = run(simulator, features, multiprocessors=multiprocessors)
    torch.testing.assert_close(variance.double(), features.double().var(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("activations", [2, 3, 5, 17, 100, 1000])
def test_error_of_few_activations_far_from_zero(simulator: ModuleType, activations: int) -> None:
    """A thread then has one activation or a few, and the variance comes from the merges."""
    noise = torch.randn(32, activations, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = (noise + 1000).float()
    check(features, *run(simulator, features))


@pytest.mark.parametrize("samples", [1, 2, 5, 40])
def test_any_number_of_samples_and_splits(simulator: ModuleType, samples: int) -> None:
    """From 66 slices a sample, more than a warp merges at once, down to one."""
    features = cases.features(samples, 40000 if samples < 5 else 3000, torch.float32)
    check(features, *run(simulator, features, multiprocessors=33))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite(simulator: ModuleType, value: float) -> None:
    features = cases.features(3, 3000, torch.float32)
    features[1, 2345] = value
    variance, extrema = run(simulator, features)
    assert variance.isfinite().tolist() == [True, False, True]
    assert extrema.tolist() == [torch.inf, torch.inf]


def test_equal_values_have_variance_zero(simulator: ModuleType) -> None:
    variance, extrema = run(simulator, torch.full((2, 3001), 0.1))
    assert variance.tolist() == [0, 0] and extrema.tolist() == [0, 0]


def test_schedules_agree_to_the_last_bit(simulator: ModuleType) -> None:
    features = cases.features(3, 20000, torch.float32)
    results = {tuple(run(simulator, features, schedule=schedule)[0].tolist()) for schedule in cases.SCHEDULES}
    assert len(results) == 1
