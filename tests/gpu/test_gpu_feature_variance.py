"""The variance on a GPU against float64."""

from __future__ import annotations

import pytest
import torch

from biasloss_ext import functional
from biasloss_ext.ops.native import simulated
from tests import oracle
from tests.gpu.gpu_inputs import SHAPES, make_features, some


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", some(SHAPES, 3), ids=str)
def test_agrees_with_float64(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    features = make_features(shape, device, dtype, channels_last)
    found = functional.feature_variance(features, backend=backend)
    exact = oracle.variance(features)
    assert found.device == features.device
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_is_exact_with_a_mean_far_above_the_deviation(mean: float, backend: str, device: torch.device) -> None:
    features = torch.randn(16, 128 if simulated() else 512, 7, 7, device=device) + mean
    found = functional.feature_variance(features, backend=backend)
    torch.testing.assert_close(found.double(), oracle.variance(features), rtol=1e-5, atol=0)


def test_reads_slices_in_place_and_at_any_alignment(backend: str, device: torch.device) -> None:
    for offset in (0, 1, 3):
        flat = torch.full((8 * 333 + 4,), torch.nan, device=device, dtype=torch.bfloat16)
        features = flat[offset : offset + 8 * 333].view(8, 333)
        features.copy_(make_features((8, 333), device))
        found = functional.feature_variance(features, backend=backend)
        torch.testing.assert_close(found.double(), oracle.variance(features), rtol=1e-5, atol=0)


def test_marks_samples_that_are_not_finite(backend: str, device: torch.device) -> None:
    features = make_features((6, 40, 5, 5), device)
    features[1, 3, 2, 2], features[4, 0, 0, 0] = torch.nan, torch.inf
    found = functional.feature_variance(features, backend=backend)
    assert found.isnan().tolist() == [False, True, False, False, True, False]


def test_more_than_2_to_31_activations(backend: str, gpu: torch.device) -> None:
    if torch.cuda.get_device_properties(gpu).total_memory < 20 * 2**30:
        pytest.skip("needs a GPU with 20 GiB of memory")
    features = torch.zeros(3, 2**30, device=gpu, dtype=torch.float16)
    features[2, ::2] = 2.0  # beyond 2^31 elements: half zeros, half twos
    found = functional.feature_variance(features, backend=backend)
    torch.testing.assert_close(found.cpu(), torch.tensor([0.0, 0.0, 1.0]), rtol=1e-5, atol=0)
