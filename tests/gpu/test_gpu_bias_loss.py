"""The loss on a GPU against float64: value, gradient, weights, running minimum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from biasloss_ext import FusedBiasLoss, functional
from tests import oracle
from tests.gpu.gpu_inputs import SHAPES, make_features, make_scores, some, within

# In the scores' own dtype: gradients are rounded once, at the end.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(features: Tensor, output: Tensor, target: Tensor, backend: str, **options: Any) -> None:
    running_min = torch.tensor(0.2, device=output.device)
    loss, weight, moved = functional.bias_loss(features, output, target, running_min, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss, output, oracle.grad_of_loss(loss).to(loss.device))
    exact = oracle.bias_loss(
        oracle.variance(features.cpu()), output.detach().cpu(), target.cpu(), running_min.cpu(), **on_cpu(options)
    )
    torch.testing.assert_close(loss.detach().double().cpu(), exact.loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(weight.double().cpu(), exact.weight, rtol=2e-5, atol=0)
    assert moved is not None
    torch.testing.assert_close(moved.double().cpu(), exact.running_min, rtol=1e-5, atol=0)
    assert gradient.dtype == output.dtype
    error = (gradient.double().cpu() - exact.gradient.double()).abs().max()
    assert error <= TOLERANCE[output.dtype] * exact.gradient.abs().max(), f"gradient: {error:.3g}"


def on_cpu(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in options.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", some(SHAPES[1:], 2), ids=str)
def test_agrees_with_float64(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    features = make_features(shape, device, dtype, channels_last)
    check(features, *make_scores(shape[0], 10, device, dtype), backend)


@pytest.mark.parametrize("classes", [1, 2, 33, 1000, 1001, within(5001)(50257)])
def test_any_number_of_classes(classes: int, backend: str, device: torch.device) -> None:
    check(make_features((9, 30, 4, 4), device), *make_scores(9, classes, device), backend)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"ignore_index": 3},
        {"alpha": 2.0, "beta": -0.5},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], backend: str, device: torch.device) -> None:
    check(make_features((40, 30, 4, 4), device), *make_scores(40, 10, device), backend, **options)


def test_class_weights_and_probabilities(backend: str, device: torch.device) -> None:
    features = make_features((40, 30, 4, 4), device)
    output, target = make_scores(40, 10, device)
    weight = torch.rand(10, device=device) + 0.5
    check(features, output, target, backend, weight=weight)
    check(features, output, torch.softmax(torch.randn(40, 10, device=device), 1), backend, weight=weight)


def test_a_batch_of_one_and_equal_variances(backend: str, device: torch.device) -> None:
    loss_fn = FusedBiasLoss(backend=backend).to(device)
    for samples in (1, 4):
        features = make_features((1, 20, 3, 3), device).expand(samples, -1, -1, -1).contiguous()
        output, target = make_scores(samples, 5, device)
        loss = loss_fn(features, output, target)
        expected = 0.7 * torch.nn.functional.cross_entropy(output, target)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_the_module_agrees_with_the_cpu_over_several_steps(backend: str, device: torch.device) -> None:
    on_gpu, on_cpu_ = FusedBiasLoss(backend=backend).to(device), FusedBiasLoss(backend="reference")
    for samples in (8, 30, 5):
        features = make_features((samples, 64, 7, 7), device)
        output, target = make_scores(samples, 100, device)
        loss = on_gpu(features, output, target)
        torch.testing.assert_close(loss.cpu(), on_cpu_(features.cpu(), output.cpu(), target.cpu()), rtol=2e-5, atol=0)
        torch.testing.assert_close(on_gpu.running_min.cpu(), on_cpu_.running_min, rtol=1e-5, atol=0)
