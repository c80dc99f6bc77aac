"""The CUDA kernels of the loss, run by the simulator, against torch's cross-entropy in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cases
import pytest
import torch
from cases import Case, assert_matches, expected, simulate

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def check(simulator: ModuleType, case: Case, schedule: dict[str, Any] | None = None) -> None:
    assert_matches(simulate(simulator, case, schedule), expected(case))


def base_case(dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    case: dict[str, Any] = {
        "features": cases.features(5, 3000, dtype),
        "output": cases.scores(5, 40, dtype=dtype),
        "target": cases.classes(5, below=40),
        "running_min": 0.5,
    }
    return Case(**{**case, **changes})


def dense_case(dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    case: dict[str, Any] = {
        "features": cases.features(3, 1000, dtype),
        "output": cases.scores(3, 11, 70, dtype=dtype),
        "target": cases.classes(3, 70, below=11),
        "running_min": 0.5,
    }
    return Case(**{**case, **changes})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", cases.SCHEDULES)
@pytest.mark.parametrize("make", [base_case, dense_case])
def test_every_schedule(simulator: ModuleType, dtype: torch.dtype, schedule: dict[str, Any], make: Any) -> None:
    check(simulator, make(dtype), schedule)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", [base_case, dense_case])
def test_options_of_cross_entropy(
    simulator: ModuleType, reduction: str, probabilities: bool, label_smoothing: float, weighted: bool, make: Any
) -> None:
    case = make(reduction=reduction, label_smoothing=label_smoothing)
    if probabilities:
        case.target = cases.scores(*case.output.shape, dtype=torch.float32, seed=5).softmax(1)
    else:
        case.ignore_index = int(case.target.flatten()[1])
    if weighted:
        case.class_weight = torch.rand(case.output.shape[1], generator=torch.Generator().manual_seed(3)) + 0.1
    check(simulator, case)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("make", [base_case, dense_case])
def test_dtypes_of_class_targets(simulator: ModuleType, dtype: torch.dtype, make: Any) -> None:
    case = make()
    case.target = case.target.to(dtype)
    check(simulator, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number_of_classes", [1, 2, 7, 33, 129, 1003, 2100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_any_number_of_classes(
    simulator: ModuleType, dtype: torch.dtype, number_of_classes: int, label_smoothing: float
) -> None:
    """Odd rows start at every alignment; above 2048 classes several warps share a row."""
    case = base_case(
        dtype,
        features=cases.features(3, 100, dtype),
        output=cases.scores(3, number_of_classes, dtype=dtype),
        target=cases.classes(3, below=number_of_classes),
        label_smoothing=label_smoothing,
    )
    check(simulator, case)


def test_very_many_classes(simulator: ModuleType) -> None:
    """Rows that the backward pass cuts into chunks, at an odd alignment, with class weights."""
    count = 17001
    case = base_case(
        features=cases.features(2, 100, torch.float32),
        output=cases.scores(2, count, dtype=torch.float32),
        target=torch.tensor([8192, count - 1]),
        class_weight=torch.rand(count) + 0.5,
        label_smoothing=0.1,
    )
    check(simulator, case)


@pytest.mark.parametrize("make", [base_case, dense_case])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("probabilities", [False, True])
def test_variance_in_place_of_features(
    simulator: ModuleType, make: Any, label_smoothing: float, probabilities: bool
) -> None:
    case = make(features=None, label_smoothing=label_smoothing)
    case.variance = torch.linspace(0.3, 2, len(case.output))
    if probabilities:
        case.target = cases.scores(*case.output.shape, dtype=torch.float32, seed=5).softmax(1)
    check(simulator, case)
    case.extrema = torch.tensor([-0.1, 4.0])  # of all ranks
    check(simulator, case)


@pytest.mark.parametrize("strides", ["transposed", "gaps", "offset", "reversed_positions", "classes_last"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_scores(simulator: ModuleType, strides: str, probabilities: bool, dtype: torch.dtype) -> None:
    make = dense_case if strides in ("reversed_positions", "classes_last") else base_case
    case = make(dtype)
    shape = case.output.shape

    def lay_out(values: torch.Tensor) -> torch.Tensor:
        if strides == "transposed":
            return values.t().contiguous().t()
        if strides == "gaps":
            return torch.full((shape[0], 2 * shape[1] + 3), torch.nan, dtype=dtype)[:, 3::2].copy_(values)
        if strides == "offset":
            return torch.full((values.numel() + 3,), torch.nan, dtype=dtype)[3:].view(shape).copy_(values)
        order = (2, 1, 0) if strides == "reversed_positions" else (0, 2, 1)
        return values.permute(order).contiguous().permute(order)

    case.output = lay_out(case.output)
    if probabilities:
        case.target = lay_out((case.output.float() * 0.3).softmax(1).to(dtype))
    # The gradient in the layout of the scores, in another one, and in one that is aligned otherwise.
    reference = expected(case)
    for gradient in (lay_out(torch.zeros(shape, dtype=dtype)), torch.zeros(shape, dtype=dtype)):
        assert_matches(simulate(simulator, case, grad_output=gradient), reference)
    misaligned = torch.zeros(case.output.numel() + 1, dtype=dtype)[1:].view(shape)
    assert_matches(simulate(simulator, case, grad_output=misaligned), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_classes_side_by_side_with_positions(simulator: ModuleType, dtype: torch.dtype) -> None:
    """channels_last scores of a segmentation: a warp takes a row, also one longer than the warp's vectors."""
    values = cases.scores(2, 600, 9, dtype=dtype)
    case = dense_case(
        dtype,
        features=cases.features(2, 500, dtype),
        output=values.permute(0, 2, 1).contiguous().permute(0, 2, 1),
        target=cases.classes(2, 9, below=600),
        label_smoothing=0.1,
    )
    check(simulator, case)


def test_many_positions(simulator: ModuleType) -> None:
    """More positions than a block has threads, shared out over several blocks a sample."""
    case = dense_case(
        output=cases.scores(2, 3, 1500, dtype=torch.float32),
        target=cases.classes(2, 1500, below=3),
        features=cases.features(2, 300, torch.float32),
        reduction="none",
        multiprocessors=1,
    )
    check(simulator, case)
    case.multiprocessors = 8
    check(simulator, case, {"seed": 4})


@pytest.mark.parametrize("make", [base_case, dense_case])
def test_gradient_of_a_loss_per_position(simulator: ModuleType, make: Any) -> None:
    case = make(reduction="none")
    shape = case.output.shape[:1] + case.output.shape[2:]
    grad_loss = torch.rand(shape[::-1], generator=torch.Generator().manual_seed(2)).permute(*range(len(shape))[::-1])
    assert_matches(simulate(simulator, case, grad_loss=grad_loss), expected(case, grad_loss))


def with_row(case: Case, row: list[float], target: int) -> Case:
    case.output[1, : len(row)] = torch.tensor(row)
    case.target[1] = target
    return case


@pytest.mark.parametrize(
    "row",
    [
        [-torch.inf] * 3,
        [-torch.inf] * 40,
        [1e4, 1e4 - 1, 1e4 + 2],
        [80, -80, 0.5],
        [torch.inf, 0, 1],
        [torch.nan, 0, 1],
        [1e38, -1e38],
    ],
)
@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_extreme_scores(simulator: ModuleType, row: list[float], target: int, label_smoothing: float) -> None:
    for number_of_classes in (40, 2500):  # one warp a row, and several
        case = base_case(
            output=cases.scores(5, number_of_classes, dtype=torch.float32),
            label_smoothing=label_smoothing,
            reduction="none",
        )
        if len(row) == 40:
            case.output[1] = -torch.inf
        case = with_row(case, row, target)
        reference = expected(case)
        result = simulate(simulator, case)
        finite = torch.isfinite(reference.loss)
        assert torch.equal(torch.isnan(result.loss), torch.isnan(reference.loss))
        assert torch.equal(torch.isinf(result.loss), torch.isinf(reference.loss))
        cases.check_close(result.loss[finite], reference.loss[finite], 1e-5, 1e-6)
        cases.check_close(result.grad_output, reference.grad_output, 1e-5, 1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_probability_zero_of_an_impossible_class(simulator: ModuleType, label_smoothing: float) -> None:
    case = base_case(label_smoothing=label_smoothing, reduction="none")
    case.output[1, 0] = -torch.inf
    case.target = torch.zeros(5, 40)
    case.target[:, 1] = 1
    result, reference = simulate(simulator, case), expected(case)
    assert torch.equal(torch.isnan(result.loss), torch.isnan(reference.loss))
    assert torch.equal(torch.isinf(result.loss), torch.isinf(reference.loss))
    cases.check_close(result.grad_output, reference.grad_output, 1e-5, 1e-6)


def test_confident_prediction_keeps_its_gradient(simulator: ModuleType) -> None:
    """p - 1 of the target, where p is nearly 1: relative to its own size, not to 1."""
    case = base_case()
    case.output.zero_()
    case.output[torch.arange(5), case.target] = 11.0
    result, reference = simulate(simulator, case), expected(case)
    got, want = (r.grad_output[torch.arange(5), case.target].double() for r in (result, reference))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    torch.testing.assert_close(result.loss.double(), reference.loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [40, 41, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("weighted", [False, True])
def test_target_out_of_range(simulator: ModuleType, bad: int, weighted: bool) -> None:
    """Its loss and its gradient are NaN; everybody else's are what they were."""
    case = base_case(reduction="none", class_weight=torch.rand(40) + 0.1 if weighted else None)
    reference = expected(case)
    case.target[2] = bad
    result = simulate(simulator, case)
    others = torch.tensor([0, 1, 3, 4])
    assert result.loss[2].isnan() and result.grad_output[2].isnan().all()
    cases.check_close(result.loss[others], reference.loss[others], 1e-5, 1e-6)
    cases.check_close(result.grad_output[others], reference.grad_output[others], 1e-5, 1e-6)


def test_one_target_out_of_range_among_positions(simulator: ModuleType) -> None:
    case = dense_case(reduction="none")
    reference = expected(case)
    case.target[1, 33] = 11
    result = simulate(simulator, case)
    wrong = torch.zeros(3, 70, dtype=torch.bool)
    wrong[1, 33] = True
    assert torch.equal(result.loss.isnan(), wrong)
    assert torch.equal(result.grad_output.isnan(), wrong[:, None].expand(3, 11, 70))
    cases.check_close(result.loss[~wrong], reference.loss[~wrong], 1e-5, 1e-6)


@pytest.mark.parametrize("make", [base_case, dense_case])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_everything_ignored(simulator: ModuleType, make: Any, reduction: str) -> None:
    case = make(reduction=reduction)
    case.target.fill_(-100)
    result, reference = simulate(simulator, case), expected(case)
    torch.testing.assert_close(result.loss.double(), reference.loss, equal_nan=True)
    assert (result.grad_output == 0).all()


def test_no_positions(simulator: ModuleType) -> None:
    case = dense_case(output=torch.empty(3, 11, 0), target=torch.empty(3, 0, dtype=torch.int64), reduction="sum")
    result = simulate(simulator, case)
    assert result.loss == 0
    cases.check_close(result.weight, cases.expected_weight(case)[0], 1e-5, 0)


@pytest.mark.parametrize("running_min", [None, float("inf"), 0.01, 100.0])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("seed", [0, 5])
def test_running_minimum(simulator: ModuleType, running_min: float | None, update: bool, seed: int) -> None:
    check(simulator, base_case(running_min=running_min, update_running_min=update), {"seed": seed})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite(simulator: ModuleType, value: float) -> None:
    case = base_case(running_min=0.25)
    assert case.features is not None
    case.features[3, 17] = value
    result = simulate(simulator, case)
    assert result.weight.isnan().all() and result.loss.isnan() and result.grad_output.isnan().all()
    assert result.running_min == 0.25


def test_equal_variances_weigh_the_same(simulator: ModuleType) -> None:
    features = cases.features(1, 3000, torch.float32).expand(5, 3000)
    result = simulate(simulator, base_case(features=features))
    torch.testing.assert_close(result.weight, torch.full((5,), 0.7))


def test_one_sample(simulator: ModuleType) -> None:
    case = base_case(output=cases.scores(1, 40, dtype=torch.float32), target=torch.tensor([3]))
    check(simulator, Case(**{**case.__dict__, "features": cases.features(1, 9000, torch.float32)}))


def test_large_exponents_are_capped(simulator: ModuleType) -> None:
    case = base_case(features=None, variance=torch.tensor([1e6, 1e6 + 1, 1e6 + 2, 1e6, 1e6]), running_min=0.0)
    result = simulate(simulator, case)
    assert result.loss.isfinite() and result.grad_output.isfinite().all()
    cases.check_close(result.weight, cases.expected_weight(case)[0], 1e-4, 0)


@pytest.mark.parametrize("samples", [33, 300])
def test_more_samples_than_the_last_block_merges_at_once(simulator: ModuleType, samples: int) -> None:
    case = base_case(
        features=cases.features(samples, 40, torch.float32),
        output=cases.scores(samples, 5, dtype=torch.float32),
        target=cases.classes(samples, below=5),
    )
    check(simulator, case, {"seed": 3})


@pytest.mark.parametrize("make", [base_case, dense_case])
def test_schedules_agree_to_the_last_bit(simulator: ModuleType, make: Any) -> None:
    results = [simulate(simulator, make(), schedule) for schedule in cases.SCHEDULES]
    for result in results[1:]:
        assert torch.equal(result.loss, results[0].loss)
        assert torch.equal(result.weight, results[0].weight)
        assert torch.equal(result.grad_output, results[0].grad_output)


def wrong_without(simulator: ModuleType, case: Case, barrier: str) -> bool:
    """Whether some schedule shows that this barrier is missing."""
    for seed in range(1, 6):
        try:
            simulate(simulator, case, {"seed": seed, "skipped_barrier": barrier})
        except simulator.Violation:
            return True
    return False


def test_no_barrier_can_go(simulator: ModuleType) -> None:
    """Takes the barriers of forward and backward away one at a time: every one is missed."""
    case = base_case(
        label_smoothing=0.1,
        class_weight=torch.rand(2500) + 0.5,
        output=cases.scores(5, 2500, dtype=torch.float32),
    )
    soft = base_case(output=case.output, target=case.output.softmax(1))
    simulator.take_barriers_met()
    simulate(simulator, case)
    simulate(simulator, soft)
    barriers = simulator.take_barriers_met()
    assert len(barriers) >= 4
    kept = [
        b for b in sorted(barriers) if not wrong_without(simulator, case, b) and not wrong_without(simulator, soft, b)
    ]
    assert kept == []
