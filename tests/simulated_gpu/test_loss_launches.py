"""The launchers of the loss and of the variance: how a batch is cut into blocks, and every alignment of its runs."""

from __future__ import annotations

import pytest
import torch

from biasloss_ext import functional
from tests import oracle
from tests.cudasim.simulated_gpu import Simulator
from tests.simulated_gpu import loss_cases as cases
from tests.simulated_gpu.loss_cases import Case

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number_of_classes", [1, 7, 129, 1003, 2100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_rows_of_every_alignment(dtype: torch.dtype, number_of_classes: int, label_smoothing: float) -> None:
    """Odd rows start anywhere; above 2048 classes several warps share a row."""
    cases.check(cases.one_row(dtype, number_of_classes, label_smoothing=label_smoothing))


def test_rows_cut_into_chunks_by_the_backward_pass(simulator: Simulator) -> None:
    count = 17001
    case = Case(cases.features(2, 100), cases.scores(2, count), torch.tensor([8192, count - 1]))
    case.options = {"label_smoothing": 0.1, "weight": torch.rand(count) + 0.5}
    cases.check(case)
    assert simulator.take_launches()[-1].grid == (2, 3, 1)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_aligned_otherwise_than_their_gradient(dtype: torch.dtype, offset: int) -> None:
    case = cases.one_row(dtype)
    storage = torch.full((case.output.numel() + 4,), torch.nan, dtype=dtype)
    case.output = storage[offset : offset + case.output.numel()].view(case.output.shape).copy_(case.output)
    cases.check(case)


@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_positions_shared_out_over_blocks(simulator: Simulator, multiprocessors: int) -> None:
    case = Case(cases.features(2, 300), cases.scores(2, 3, 1500), classes(2, 1500), {"reduction": "none"})
    with simulator.using(multiprocessors=multiprocessors):
        cases.check(case)
    forward, weighing, _ = simulator.take_launches()
    assert forward.grid[0] == 2 * min(-(-1500 // 256), 8 * multiprocessors)
    assert weighing.grid[0] == -(-2 * 1500 // 256)


def classes(*shape: int) -> torch.Tensor:
    return cases.classes(*shape, below=3)


def test_classes_side_by_side_with_positions() -> None:
    """Rows longer than a warp's vectors."""
    output = cases.scores(2, 9, 600).permute(0, 2, 1)
    cases.check(Case(cases.features(2, 500), output, cases.classes(2, 9, below=600), {"label_smoothing": 0.1}))


@pytest.mark.parametrize("samples", [1, 33, 300])
def test_more_samples_than_the_last_block_merges_at_once(samples: int) -> None:
    case = Case(cases.features(samples, 40), cases.scores(samples, 5), cases.classes(samples, below=5))
    cases.check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [cases.one_row, cases.dense])
def test_float32_probabilities_of_16_bit_scores_are_not_rounded(dtype: torch.dtype, make: object) -> None:
    case = make(dtype)  # type: ignore[operator]
    case.target = cases.scores(*case.output.shape).softmax(1)
    assert not torch.equal(case.target.to(dtype).float(), case.target)
    cases.check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", [1, 2, 7, 8, 9, 31, 255, 1025, 4099])
def test_variance_of_runs_of_every_alignment(dtype: torch.dtype, activations: int) -> None:
    """Samples that start anywhere, at any distance: the stride is odd, so that every one is aligned differently."""
    for offset in (0, 1, 2, 3, 5, 7):
        storage = torch.full((offset + 3 * (activations + 5),), torch.nan, dtype=dtype)
        view = storage[offset:].as_strided((3, activations), (activations + 4 + activations % 2, 1))
        view.copy_(cases.features(3, activations, dtype))
        found = functional.feature_variance(view, backend="cuda")
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found.double(), oracle.variance(view), rtol=tolerance, atol=0)


@pytest.mark.parametrize("samples", [1, 2, 5, 40])
def test_variance_of_any_number_of_samples_and_slices(simulator: Simulator, samples: int) -> None:
    """From 10 slices a sample down to one; with more multiprocessors than a warp merges slices at once."""
    activations = 40000 if samples < 5 else 3000
    features = cases.features(samples, activations)
    with simulator.using(multiprocessors=33):
        found = functional.feature_variance(features, backend="cuda")
    torch.testing.assert_close(found.double(), oracle.variance(features), rtol=1e-5, atol=0)
    (launch,) = simulator.take_launches()
    slices = max(1, min(activations * 4 // (256 * 16), -(-66 // samples)))
    assert launch.grid == (samples * slices, 1, 1)
    assert launch.threads == 256
