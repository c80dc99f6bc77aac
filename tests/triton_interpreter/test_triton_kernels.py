"""What the tests of every backend do not reach: tiles, slices and blocks beyond the first, layouts as the op gets them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from biasloss_ext.ops import triton_launch
from biasloss_ext.ops.bias_loss import triton as bias_loss
from biasloss_ext.ops.bias_loss.reference import MEAN, NONE, SUM
from biasloss_ext.ops.feature_variance import triton as feature_variance
from tests import oracle

REDUCTIONS = {NONE: "none", MEAN: "mean", SUM: "sum"}


def forward(
    output: Tensor,
    target: Tensor,
    *,
    features: Tensor | None = None,
    variance: Tensor | None = None,
    extrema: Tensor | None = None,
    class_weight: Tensor | None = None,
    running_min: Tensor | None = None,
    update_running_min: bool = True,
    reduction: int = MEAN,
    label_smoothing: float = 0.0,
) -> bias_loss.Outputs:
    return bias_loss.bias_loss(
        features,
        variance,
        extrema,
        output,
        target,
        class_weight,
        running_min,
        0.3,
        0.3,
        update_running_min,
        reduction,
        -100,
        label_smoothing,
    )


def assert_close_to_float64(
    output: Tensor,
    target: Tensor,
    features: Tensor,
    class_weight: Tensor | None = None,
    reduction: int = MEAN,
    smoothing: float = 0.0,
) -> None:
    """Loss and gradient, to a few roundings of float32."""
    options = {"weight": class_weight, "reduction": REDUCTIONS[reduction], "label_smoothing": smoothing}
    exact = oracle.bias_loss(oracle.variance(features), output, target, **options)
    outputs = forward(
        output, target, features=features, class_weight=class_weight, reduction=reduction, label_smoothing=smoothing
    )
    gradient = bias_loss.bias_loss_backward(
        oracle.grad_of_loss(outputs[0]), output, target, class_weight, *outputs[1:], reduction, -100, smoothing
    )
    torch.testing.assert_close(outputs[0].double(), exact.loss, rtol=2e-6, atol=1e-6)
    atol = 2e-6 * exact.gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact.gradient, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("kind", ["classes", "smoothed and weighted", "probabilities"])
@pytest.mark.parametrize("classes", [1025, 5000, 20001])
def test_rows_longer_than_a_tile(classes: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(classes)
    output = 3 * torch.randn(3, classes, generator=generator)
    output[0, -1] = 20.0  # the maximum comes last
    output[1, 0] = 20.0
    output[2, ::2] = -torch.inf if kind == "classes" else -50.0
    target = torch.tensor([classes - 1, 17, 1])
    class_weight, smoothing = None, 0.0
    if kind != "classes":
        class_weight, smoothing = torch.rand(classes, generator=generator), 0.1
    if kind == "probabilities":
        target = torch.softmax(torch.randn(3, classes, generator=generator), 1)
    features = torch.randn(3, 7, generator=generator)
    assert_close_to_float64(output, target, features, class_weight, smoothing=smoothing)


@pytest.mark.parametrize("reduction", [NONE, MEAN])
def test_more_positions_than_one_step_of_the_reduction(reduction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias_loss, "MOST_ROWS", 2)
    generator = torch.Generator().manual_seed(0)
    positions = 2 * 70 + 1
    output = torch.randn(2, 3, positions, generator=generator)
    target = torch.randint(3, (2, positions), generator=generator)
    target[:, ::3] = -100
    features = torch.randn(2, 50, generator=generator) * torch.tensor([[1.0], [2.0]])
    assert_close_to_float64(output, target, features, torch.rand(3, generator=generator), reduction)


def test_more_samples_than_one_step_of_the_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_variance, "TILE", 16)
    monkeypatch.setattr(bias_loss, "LOSS_TILE", 8)
    generator = torch.Generator().manual_seed(0)
    samples = 16 + 9
    features = torch.randn(samples, 3, generator=generator)
    features[-1] *= 10  # the extrema lie in the last step
    features[-2] *= 0.001
    output = torch.randn(samples, 2, generator=generator)
    target = torch.randint(2, (samples,), generator=generator)
    assert_close_to_float64(output, target, features)
    variance, extrema = feature_variance.feature_variance(features)
    assert extrema.tolist() == [-variance.min().item(), variance.max().item()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [2, 4, 5, 40])
def test_merge_of_slices(slices: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices whose means differ by far more than the spread within them, all of it far from zero."""
    monkeypatch.setattr(feature_variance, "TILE", 64)  # a few samples a step
    monkeypatch.setattr(feature_variance, "WANTED_PROGRAMS", 1)
    monkeypatch.setattr(feature_variance, "LONGEST_SLICE", 1)
    lanes = 512 if dtype == torch.float32 else 1024
    length = lanes * (slices - 1) + 137
    torch.manual_seed(slices)
    features = torch.randn(3, length) + 1000 + torch.arange(length) // lanes * 30.0
    features = features.to(dtype)
    assert feature_variance.slicing(features).slices == slices
    variance, _ = feature_variance.feature_variance(features)
    torch.testing.assert_close(variance.double(), oracle.variance(features), rtol=2e-6, atol=0)


def test_dense_samples_are_read_in_place() -> None:
    whole = torch.randn(6, 5, 3, 4)
    for dense in (
        whole,
        whole[::2],
        whole[1:2],
        whole[:1].expand(6, 5, 3, 4),
        whole.contiguous(memory_format=torch.channels_last),
        whole.permute(0, 3, 1, 2),
        whole[:, :1],
        whole[:, :, None],
        torch.randn(6),
    ):
        cut = feature_variance.slicing(dense)
        assert cut.features is dense
        torch.testing.assert_close(feature_variance.feature_variance(dense)[0].double(), oracle.variance(dense))
    for gaps in (whole[:, :, :2], whole.transpose(0, 1), whole[:, :1].expand(6, 5, 3, 4)):
        cut = feature_variance.slicing(gaps)
        assert cut.features is not gaps
        torch.testing.assert_close(feature_variance.feature_variance(gaps)[0].double(), oracle.variance(gaps))


def test_width_of_loads() -> None:
    """As wide as address, length and stride allow: what the compiler is told must be true."""
    memory = torch.zeros(4096, dtype=torch.bfloat16)
    assert memory.data_ptr() % 16 == 0

    def width(start: int, length: int, stride: int, samples: int = 3) -> int:
        return feature_variance.slicing(memory[start:].as_strided((samples, length), (stride, 1))).vector

    assert width(0, 64, 64) == 8
    assert width(8, 64, 64) == 8
    assert width(4, 64, 64) == 4
    assert width(1, 64, 64) == 1
    assert width(0, 98, 98) == 2
    assert width(0, 64, 66) == 2
    assert width(0, 64, 66, samples=1) == 8
    assert feature_variance.slicing(torch.zeros(2, 64, dtype=torch.float64)).vector == 2
    # A slice that ends within a vector would be read past its end.
    for length in (520, 1000 * 8, 33333 * 8):
        cut = feature_variance.slicing(torch.zeros(2, length, dtype=torch.bfloat16))
        assert cut.slice_length % cut.vector == 0
        assert (cut.slices - 1) * cut.slice_length < length <= cut.slices * cut.slice_length


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_kept_for_the_backward_pass(dense: bool) -> None:
    torch.manual_seed(0)
    output = 5 * torch.randn((4, 6, 3) if dense else (4, 6))
    target = torch.randint(6, (4, 3) if dense else (4,))
    target[1] = -100
    class_weight = torch.rand(6)
    rows = output.movedim(1, -1).reshape(-1, 6)
    for reduction in (NONE, MEAN, SUM):
        *_, statistics = forward(output, target, variance=torch.rand(4), class_weight=class_weight, reduction=reduction)
        denominator, row_max, row_log_sum = statistics.split((1, len(rows), len(rows)))
        assert torch.equal(row_max, rows.amax(1))
        torch.testing.assert_close(row_log_sum, torch.logsumexp(rows - rows.amax(1, keepdim=True), 1))
        expected = class_weight[target[target != -100]].sum() if reduction == MEAN else torch.tensor(1.0)
        torch.testing.assert_close(denominator.squeeze(), expected)
    *_, statistics = forward(output, torch.softmax(output, 1), variance=torch.rand(4))
    assert statistics[0] == rows.shape[0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_targets_of_any_strides(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    output, variance = torch.randn(4, 5, 6), torch.rand(4)
    target = torch.full((6, 8), 77, dtype=dtype)
    target[:, ::2] = torch.randint(5, (6, 4), dtype=dtype)
    strided = target[:, ::2].t()
    (loss, *kept), (expected, *_) = (forward(output, t, variance=variance) for t in (strided, strided.contiguous()))
    assert torch.equal(loss, expected)
    gradients = [
        bias_loss.bias_loss_backward(torch.tensor(1.0), output, t, None, *kept, MEAN, -100, 0.0)
        for t in (strided, strided.contiguous())
    ]
    assert torch.equal(*gradients)


def test_class_out_of_range_leaves_the_other_rows_alone() -> None:
    """Nor does it change their gradients: the denominator counts it, as the reference does."""
    torch.manual_seed(0)
    output, variance = torch.randn(4, 5), torch.rand(4)
    for wrong in (5, -1, 2**40, -(2**62)):
        target = torch.tensor([0, 1, wrong, 3])
        loss, *kept = forward(output, target, variance=variance)
        assert loss.isnan()
        gradient = bias_loss.bias_loss_backward(torch.tensor(1.0), output, target, None, *kept, MEAN, -100, 0.0)
        valid = torch.where(target == wrong, 2, target)
        _, *kept = forward(output, valid, variance=variance)
        expected = bias_loss.bias_loss_backward(torch.tensor(1.0), output, valid, None, *kept, MEAN, -100, 0.0)
        expected[2] = torch.nan
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_extrema_and_running_minimum(dtype: torch.dtype) -> None:
    output, target = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    variance = torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0], dtype=dtype)[::2]
    extrema = torch.tensor([-0.5, 4.5], dtype=dtype)  # of all ranks
    expected = torch.exp(0.3 * (variance.float() - 0.25) / 4.0) - 0.3
    for update in (False, True):
        running_min = torch.tensor(0.25)
        weight = forward(
            output, target, variance=variance, extrema=extrema, running_min=running_min, update_running_min=update
        )[1]
        torch.testing.assert_close(weight, expected)
        assert running_min.item() == 0.25
        running_min = torch.tensor(7.0)
        forward(output, target, variance=variance, extrema=extrema, running_min=running_min, update_running_min=update)
        assert running_min.item() == (0.5 if update else 7.0)
        # Another rank's batch is not finite.
        infinite = torch.full((2,), torch.inf, dtype=dtype)
        running_min = torch.tensor(7.0)
        weight = forward(
            output, target, variance=variance, extrema=infinite, running_min=running_min, update_running_min=update
        )[1]
        assert weight.isnan().all()
        assert running_min.item() == 7.0


def test_batch_of_no_samples_or_no_positions() -> None:
    none = forward(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), variance=torch.zeros(0))
    assert none[0].isnan()
    assert none[2].item() == 0.0
    no_positions = forward(
        torch.zeros(2, 4, 0), torch.zeros(2, 0, dtype=torch.int64), variance=torch.tensor([1.0, 2.0]), reduction=SUM
    )
    assert no_positions[0].item() == 0.0
    torch.testing.assert_close(no_positions[1], torch.tensor([0.7, 1.0498588]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [77, 20000])
def test_variance_of_large_features(length: int, dtype: torch.dtype) -> None:
    """Finite as long as the variance is, though sums of squares are not; exactly 0 for constants."""
    torch.manual_seed(0)
    noise = torch.randn(2, length)
    with_outlier = noise.clone()
    with_outlier[:, -1] = 1e19
    for features in (noise * 1e18, with_outlier, noise * 1e-18):
        given = features.to(dtype)
        variance, extrema = feature_variance.feature_variance(given)
        torch.testing.assert_close(variance.double(), oracle.variance(given), rtol=2e-6, atol=0)
        assert extrema.tolist() == [-variance.min().item(), variance.max().item()]
    constant = torch.full((2, length), 1.1e30, dtype=dtype)
    assert feature_variance.feature_variance(constant)[0].tolist() == [0.0, 0.0]
    constant[0, 3] = torch.inf
    variance, extrema = feature_variance.feature_variance(constant)
    assert variance.isnan().tolist() == [True, False] and extrema.tolist() == [torch.inf, torch.inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_are_not_rounded_to_the_dtype_of_the_scores(smoothing: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    output, features = torch.randn(8, 50).to(dtype), torch.randn(8, 7)
    target = torch.softmax(torch.randn(8, 50), 1)
    exact = oracle.bias_loss(oracle.variance(features), output, target, reduction="mean", label_smoothing=smoothing)
    loss = forward(output, target, features=features, label_smoothing=smoothing)[0]
    torch.testing.assert_close(loss.double(), exact.loss, rtol=2e-6, atol=0)
    rounded = forward(output, target.to(dtype), features=features, label_smoothing=smoothing)[0]
    assert abs(rounded - loss) > 2e-6 * loss


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_a_second_call_finds_its_plan_and_its_counters(reduction: int, dense: bool) -> None:
    torch.manual_seed(0)
    output = torch.randn((5, 6, 3) if dense else (5, 6))
    target, features = torch.randint(6, (5, 3) if dense else (5,)), torch.randn(5, 2000)
    running = [torch.tensor(0.9) for _ in range(2)]
    first, second = (forward(output, target, features=features, running_min=r, reduction=reduction) for r in running)
    assert all(map(torch.equal, first, second)) and torch.equal(*running)
    assert len(bias_loss._plans) == 1
    assert not any(counters.any() for counters in triton_launch._of_stream.values())


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_empty_batches_of_features(reduction: int) -> None:
    running_min = torch.tensor(0.5)
    loss, weight, _ = forward(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), features=torch.zeros(0, 7), running_min=running_min,
        reduction=reduction,
    )  # fmt: skip
    assert loss.shape == ((0,) if reduction == NONE else ()) and weight.shape == (0,)
    assert reduction == NONE or loss.isnan() == (reduction == MEAN)
    assert running_min.item() == 0.5
    variance, extrema = feature_variance.feature_variance(torch.zeros(0, 7))
    assert variance.shape == (0,) and extrema.tolist() == [-torch.inf, -torch.inf]
