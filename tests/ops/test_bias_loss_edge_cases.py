"""The cases in which the authors' code fails, and those of torch's cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import biasloss_ext
from biasloss_ext import functional
from biasloss_ext.functional import bias_loss
from tests.runnable import backends_of

BACKENDS = backends_of("bias_loss")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def batch(samples: int = 4, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, 3, 4, 4, generator=generator) * torch.linspace(0.5, 2, samples).view(-1, 1, 1, 1)
    output = torch.randn(samples, classes, generator=generator).requires_grad_()
    return features, output, torch.randint(classes, (samples,), generator=generator)


def gradient(loss: Tensor, output: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, output)
    return result


def test_check_figures_of_the_weights() -> None:
    # v = 0.2, 0.6, 1.0 after min and max 0 and 1
    weight = biasloss_ext.bias_weight(torch.tensor([0.0, 0.2, 0.6, 1.0]))
    torch.testing.assert_close(weight, torch.tensor([0.7, 0.7618, 0.8972, 1.0499]), rtol=0, atol=5e-5)
    weight = biasloss_ext.bias_weight(torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64), alpha=2.0, beta=0.5)
    expected = torch.tensor([0.5, math.exp(0.5) - 0.5, math.exp(2.0) - 0.5], dtype=torch.float64)
    torch.testing.assert_close(weight, expected, rtol=1e-14, atol=0)


@every_backend
def test_equal_variances_and_a_single_sample(backend: str) -> None:
    features, output, target = batch()
    equal = features[:1].expand_as(features)
    loss, weight, moved = bias_loss(equal, output, target, torch.tensor(0.001), backend=backend)
    torch.testing.assert_close(weight, torch.full((4,), 0.7))
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(output, target))
    assert gradient(loss, output).isfinite().all()
    assert moved is not None
    torch.testing.assert_close(moved, torch.tensor(0.001))
    loss, weight, _ = bias_loss(features[:1], output[:1], target[:1], backend=backend)
    torch.testing.assert_close(weight, torch.tensor([0.7]))


@every_backend
def test_global_mode_exceeds_one_and_is_capped(backend: str) -> None:
    _, output, target = batch()
    variance = torch.tensor([1.0, 1.5, 2.0, 1.2])
    _, weight, moved = bias_loss(None, output, target, torch.tensor(0.5), variance=variance, backend=backend)
    torch.testing.assert_close(weight, torch.exp(0.3 * (variance - 0.5)) - 0.3)
    assert moved is not None
    assert moved.item() == 0.5
    tiny = torch.tensor([1.0, 1.0 + 1e-6, 1.0, 1.0])  # v near 1e6: exp would overflow, then yield NaN
    loss, weight, _ = bias_loss(None, output, target, torch.tensor(0.0), variance=tiny, backend=backend)
    torch.testing.assert_close(weight, torch.full((4,), math.exp(60.0)))
    assert loss.isfinite()
    assert gradient(loss, output).isfinite().all()


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_features(backend: str, bad: float) -> None:
    features, output, target = batch()
    features[2, 1, 1, 1] = bad
    loss, weight, moved = bias_loss(features, output, target, torch.tensor(0.25), backend=backend)
    assert loss.isnan()
    assert weight.isnan().all()
    assert gradient(loss, output).isnan().all()
    assert moved is not None
    assert moved.item() == 0.25


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(backend: str, reduction: str) -> None:
    output = torch.zeros(0, 5, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)
    loss, weight, moved = bias_loss(
        torch.zeros(0, 3, 4, 4), output, target, torch.tensor(0.5), reduction=reduction, backend=backend
    )
    expected = F.cross_entropy(output, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert gradient(loss.sum(), output).shape == (0, 5)
    assert weight.shape == (0,)
    assert moved is not None
    assert moved.item() == 0.5


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored(backend: str, reduction: str) -> None:
    features, output, _ = batch()
    target = torch.full((4,), -100)
    loss, *_ = bias_loss(features, output, target, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(output, target, reduction=reduction), equal_nan=True)
    assert (gradient(loss.sum(), output) == 0).all()


@every_backend
def test_ignored_sample_with_nan_scores(backend: str) -> None:
    features, output, target = batch()
    target[1] = -100
    with torch.no_grad():
        output[1] = torch.nan
    loss, *_ = bias_loss(features, output, target, backend=backend)
    assert loss.isfinite()
    if backend != "reference":  # plain autograd multiplies the NaN by zero
        assert (gradient(loss, output)[1] == 0).all()


@every_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("probabilities", [False, True])
def test_infinite_scores_as_in_torch(backend: str, label_smoothing: float, probabilities: bool) -> None:
    features, output, target = batch(6)
    scores = output.detach().clone()
    scores[0, (target[0] + 1) % 5] = -math.inf
    scores[1, target[1]] = -math.inf
    scores[2] = -math.inf
    scores[3, 2] = math.inf
    scores[4, 1] = math.nan
    if probabilities:
        target = F.one_hot(target, 5).float()
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    loss, weight, _ = bias_loss(features, ours, target, backend=backend, **options)
    expected = weight * F.cross_entropy(theirs, target, **options)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    if not probabilities and label_smoothing == 0:
        finite = torch.tensor([0, 1, 5])
        torch.testing.assert_close(
            gradient(loss[finite].sum(), ours)[finite], gradient(expected[finite].sum(), theirs)[finite]
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@every_backend
def test_class_out_of_range(backend: str, dtype: torch.dtype) -> None:
    features, output, target = batch()
    for value in (5, 200, *(() if dtype == torch.uint8 else (-1,))):
        wrong = target.to(dtype)
        wrong[2] = value
        if backend in ("cpu", "reference"):
            running_min = torch.tensor(9.0)
            with pytest.raises(IndexError, match=rf"target of sample 2 is {value}, expected a class in \[0, 5\)"):
                bias_loss(features, output, wrong, running_min, backend=backend)
        else:
            loss, *_ = bias_loss(features, output, wrong, reduction="none", backend=backend)
            assert loss.isnan().tolist() == [False, False, True, False]
            assert gradient(loss.sum(), output).isnan().any(1).tolist() == [False, False, True, False]


def test_check_targets_raises_on_every_backend() -> None:
    features, output, target = batch()
    target[3] = 17
    biasloss_ext.check_targets(True)
    try:
        with pytest.raises(IndexError, match=r"target of sample 3 is 17, expected a class in \[0, 5\)"):
            bias_loss(features, output, target, backend="reference")
        target[3] = -100
        bias_loss(features, output, target, backend="reference")
    finally:
        biasloss_ext.check_targets(False)


@every_backend
def test_confident_predictions_keep_their_gradient(backend: str) -> None:
    """p - 1 of a nearly certain class, in float32, against float64."""
    scores = torch.zeros(2, 10)
    scores[:, 3] = 18.0
    target = torch.tensor([3, 3])
    wide = scores.double().requires_grad_()
    exact = gradient(F.cross_entropy(wide, target, reduction="sum"), wide)
    ours = scores.clone().requires_grad_()
    loss, weight, _ = bias_loss(torch.ones(2, 2), ours, target, reduction="sum", backend=backend)
    error = (gradient(loss, ours) / weight.view(-1, 1) - exact).abs().max()
    theirs = scores.clone().requires_grad_()
    own = (gradient(F.cross_entropy(theirs, target, reduction="sum"), theirs) - exact).abs().max()
    assert error <= 2 * own


@every_backend
@pytest.mark.parametrize("positions", [(), (40,)])  # the CPU takes few rows one by one, many rows side by side
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_confident_predictions_keep_their_loss(backend: str, positions: tuple[int, ...], classes: int) -> None:
    """The loss consists of the terms next to the 1 of the largest score, which keep their digits in float32."""
    certainty = torch.tensor([4.0, 12.0, 18.0, 30.0])
    scores = torch.rand(4, classes, *positions, generator=torch.Generator().manual_seed(classes))
    scores[:, 1] = certainty.view(-1, *[1] * len(positions))
    target = torch.ones(4, *positions, dtype=torch.long)
    others = scores.double()[:, torch.arange(classes) != 1] - scores.double()[:, 1:2]
    exact = others.exp().sum(1).log1p()
    variance = torch.ones(4)  # equal: every weight is 1 with beta=0
    loss = bias_loss(None, scores, target, variance=variance, beta=0.0, reduction="none", backend=backend).loss
    theirs = (F.cross_entropy(scores, target, reduction="none") - exact).abs()
    # The reference is torch's own computation. Half a unit in the last place per unit of the exponent is lost in the
    # difference to the largest score, and as much in Triton's exponential.
    allowed = 2 * theirs if backend == "reference" else 40 * torch.finfo(torch.float32).eps * exact
    assert ((loss - exact).abs() <= allowed).all()


def test_second_derivative_raises() -> None:
    features, output, target = batch()
    (first,) = torch.autograd.grad(bias_loss(features, output, target, backend="cpu").loss, output, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; backend='reference'"):
        first.square().sum().backward()
    loss = bias_loss(features, output, target, backend="reference").loss
    (first,) = torch.autograd.grad(loss, output, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), output)[0].isfinite().all()


@every_backend
def test_scores_and_running_minimum_are_not_overwritten(backend: str) -> None:
    features, output, target = batch()
    before, running_min = output.detach().clone(), torch.tensor(99.0)
    loss, *_ = bias_loss(features, output, target, running_min, backend=backend)
    loss.backward()
    assert torch.equal(before, output)
    assert running_min.item() == 99.0


@every_backend
def test_bit_identical_twice_and_for_any_number_of_threads(backend: str) -> None:
    torch.manual_seed(0)
    features, target = torch.randn(40, 64, 20, 20), torch.randint(1000, (40,))
    output = torch.randn(40, 1000, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        loss = bias_loss(features, output, target, backend=backend).loss
        return loss, gradient(loss, output)

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if backend == "cpu":
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = run()
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, alone, strict=True))


@every_backend
def test_variance_computed_already(backend: str) -> None:
    features, output, target = batch()
    variance = functional.feature_variance(features, backend=backend)
    torch.testing.assert_close(
        bias_loss(None, output, target, variance=variance.requires_grad_(), backend=backend).loss,
        bias_loss(features, output, target, backend=backend).loss,
    )


@every_backend
def test_strided_variance_target_and_class_weights(backend: str) -> None:
    features, output, target = batch()
    variance = functional.feature_variance(features, backend=backend)
    spread = [torch.stack((t, torch.zeros_like(t)), 1)[:, 0] for t in (variance, target, torch.rand(5))]
    assert not any(t.is_contiguous() for t in spread)
    losses = [
        bias_loss(None, output, target, variance=variance, weight=weight, backend=backend).loss
        for variance, target, weight in (spread, [t.contiguous() for t in spread])
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    torch.testing.assert_close(*(gradient(loss, output) for loss in losses), rtol=0, atol=0)
    plain = bias_loss(features, output, spread[1], backend=backend).loss
    torch.testing.assert_close(plain, bias_loss(features, output, target, backend=backend).loss, rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"alpha": -0.1}, ValueError, "alpha must be finite and at least 0, got -0.1"),
        ({"alpha": "big"}, TypeError, "alpha must be a number, got str"),
        ({"beta": 1.0}, ValueError, "beta must be finite and below 1, got 1.0"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"normalisation_mode": "batch"}, ValueError, r"must be one of \('global', 'local'\), got 'batch'"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of .* got 'avg'"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'; there are: auto, reference, cpu, cuda, triton"),
        ({"features": None}, ValueError, "features is None: give the features, or their variance"),
        ({"variance": torch.ones(4)}, ValueError, "either features or variance=, not both"),
        ({"features": torch.zeros(3, 2)}, ValueError, "features has 3 samples, output has 4"),
        ({"output": torch.zeros(4)}, ValueError, r"output must have shape \(N, K, \*d\) with K >= 1, got \(4,\)"),
        ({"output": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "output must be float16, .* got torch.int32"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, TypeError, "must be int64, int32 or uint8, got torch.bool"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"must have shape \(4,\) .* got \(5,\)"),
        ({"target": torch.zeros(4, 6)}, ValueError, r"must have the shape of output, \(4, 5\), got \(4, 6\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(5,\), one per class, got \(4,\)"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "target is on meta, output on cpu"),
        ({"features": torch.zeros(4, 0)}, ValueError, r"at least one activation per sample, got shape \(4, 0\)"),
        ({"features": torch.tensor(0.0)}, ValueError, "features must have shape .* without dimensions"),
        ({"features": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "features must be float16, .* got torch.int64"),
        ({"features": torch.zeros(4, 2, device="meta")}, ValueError, "features is on meta, output on cpu"),
        ({"output": torch.zeros(4, 0)}, ValueError, r"output must have shape .* got \(4, 0\)"),
        ({"output": torch.zeros(5, 5)}, ValueError, r"must have shape \(5,\) for output of shape \(5, 5\), got \(4,\)"),
        ({"output": [1.0]}, TypeError, "output must be a tensor, got list"),
        ({"target": 3}, TypeError, "target must be a tensor, got int"),
    ],
)
def test_bad_input(backend: str, changed: dict[str, object], error: type[Exception], message: str) -> None:
    features, output, target = batch()
    arguments = {"backend": backend, "features": features, "output": output, "target": target, **changed}
    with pytest.raises(error, match=message):
        bias_loss(**arguments)  # type: ignore[arg-type]


def test_scores_that_are_no_tensor_reach_no_attribute_error() -> None:
    features, _, target = batch()
    with pytest.raises(TypeError, match="output must be a tensor, got list"):
        biasloss_ext.FusedBiasLoss()(features, [1.0], target)


# What an exported program or torch.ops may hand over without a look from the Python API.
BAD_ARGUMENTS = [
    (0, None, "either features or variance"),
    (0, torch.randn(3, 6), "features of 4 samples"),
    (0, torch.randn(4, 0), "at least one activation"),
    (0, torch.zeros(4, 6, dtype=torch.int64), "floating-point features"),
    (1, torch.rand(4), "either features or variance"),
    (2, torch.rand(3), "2 contiguous values of float32 as extrema"),
    (3, torch.randn(4), r"scores \(N, K\) or \(N, K, S\), got 1 dimensions"),
    (3, torch.randn(4, 5, 1, 1), "got 4 dimensions"),
    (3, torch.randn(4, 0), "classes, got 0"),
    (3, torch.zeros(4, 5, dtype=torch.int64), "floating-point scores"),
    (4, torch.zeros(5, dtype=torch.int64), "one class for each of 4 x 1 rows"),
    (4, torch.zeros(4, 1, dtype=torch.int64), "one class for each of 4 x 1 rows"),
    (4, torch.zeros((), dtype=torch.int64), "one class for each of 4 x 1 rows"),
    (4, torch.zeros(4, dtype=torch.bool), "int64, int32 or uint8 classes"),
    (4, torch.zeros(4, 6), "probabilities of the shape of the scores"),
    (4, torch.zeros(4, 5, dtype=torch.float64), "probabilities in the dtype of the scores"),
    (5, torch.rand(4), "5 contiguous values of float32 as class weights"),
    (5, torch.rand(5, dtype=torch.float64), "5 contiguous values of float32 as class weights"),
    (5, torch.rand(10)[::2], "5 contiguous values of float32 as class weights"),
    (6, torch.rand(2), "one float32 value as running minimum"),
    (6, torch.rand((), dtype=torch.float64), "one float32 value as running minimum"),
]


@pytest.mark.parametrize(("position", "bad", "message"), BAD_ARGUMENTS)
def test_the_op_refuses_what_it_would_misread(position: int, bad: Tensor | None, message: str) -> None:
    features, output, target = batch()
    arguments = [features, None, None, output.detach(), target, None, torch.tensor(0.5)]
    arguments[position] = bad
    with pytest.raises(RuntimeError, match=message):
        torch.ops.biasloss_ext.bias_loss(*arguments, 0.3, 0.3, True, 1, -100, 0.0)


@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.rand(4, 1), "gradient of the loss in its shape and dtype"),
        (0, torch.rand((), dtype=torch.float64), "gradient of the loss in its shape and dtype"),
        (1, torch.randn(4), "got 1 dimensions"),
        (2, torch.zeros(5, dtype=torch.int64), "one class for each of 4 x 1 rows"),
        (3, torch.rand(4), "5 contiguous values of float32 as class weights"),
        (4, torch.rand(5), "4 contiguous values of float32 as weight"),
        (5, torch.rand(8), "9 contiguous values of float32 as statistics"),
    ],
)
def test_the_backward_op_refuses_what_it_would_misread(position: int, bad: Tensor, message: str) -> None:
    _, output, target = batch()
    arguments = [torch.tensor(1.0), output.detach(), target, None, torch.rand(4), torch.rand(9)]
    torch.ops.biasloss_ext.bias_loss_backward(*arguments, 1, -100, 0.0)
    arguments[position] = bad
    with pytest.raises(RuntimeError, match=message):
        torch.ops.biasloss_ext.bias_loss_backward(*arguments, 1, -100, 0.0)
