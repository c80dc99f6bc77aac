"""The module: state, devices and dtypes of its buffers, autocast, accumulation, checkpointing."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from biasloss_ext import FusedBiasLoss, functional
from tests import oracle
from tests.runnable import backends_of

KERNELS = backends_of("bias_loss")[0]


def batch(seed: int = 0, samples: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(samples, 1, 1, 1, generator=generator) + 0.5
    features = torch.randn(samples, 8, 3, 3, generator=generator) * scale
    output = torch.randn(samples, 5, generator=generator).requires_grad_()
    return features, output, torch.randint(5, (samples,), generator=generator)


def test_global_mode_remembers_the_smallest_variance() -> None:
    loss_fn = FusedBiasLoss()
    assert loss_fn.running_min.isinf()
    expected = torch.tensor(torch.inf)
    for seed in range(5):
        features, output, target = batch(seed)
        loss, weights = loss_fn(features, output, target, return_weights=True)
        exact = oracle.bias_loss(oracle.variance(features), output, target, expected)
        assert exact.running_min is not None
        expected = exact.running_min
        torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(weights.double(), exact.weight, rtol=1e-5, atol=0)
        assert not weights.requires_grad
        torch.testing.assert_close(loss_fn.running_min.double(), expected, rtol=1e-5, atol=0)
    loss_fn.reset_running_min()
    assert loss_fn.running_min.isinf()


def test_local_mode_ignores_the_running_minimum() -> None:
    loss_fn = FusedBiasLoss(normalisation_mode="local")
    features, output, target = batch()
    first = loss_fn(features, output, target)
    loss_fn(features * 0.01, output, target)
    assert torch.equal(loss_fn(features, output, target), first)
    assert loss_fn.running_min.isinf()


def test_evaluation_uses_but_does_not_move_the_running_minimum() -> None:
    loss_fn = FusedBiasLoss()
    features, output, target = batch()
    loss_fn(features, output, target)
    before = loss_fn.running_min.clone()
    trained = loss_fn(features, output, target)
    loss_fn.eval()
    assert torch.equal(loss_fn(features, output, target), trained)
    small = features * 0.01
    exact = oracle.bias_loss(oracle.variance(small), output, target, before)
    torch.testing.assert_close(loss_fn(small, output, target).double(), exact.loss, rtol=1e-5, atol=0)
    assert torch.equal(loss_fn.running_min, before)


def test_state_dict_carries_on() -> None:
    loss_fn = FusedBiasLoss()
    features, output, target = batch()
    loss_fn(features, output, target)
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    other = FusedBiasLoss()
    other.load_state_dict(torch.load(file, weights_only=True))
    larger = features * 2
    assert torch.equal(loss_fn(larger, output, target), other(larger, output, target))
    assert set(loss_fn.state_dict()) == {"running_min"}


def test_running_minimum_stays_float32() -> None:
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": FusedBiasLoss(weight=torch.ones(5))})
    loss_fn = model["loss"]
    features, output, target = batch()
    loss_fn(features, output, target)
    exact = loss_fn.running_min.clone()
    for convert in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        convert()
        assert loss_fn.running_min.dtype == torch.float32
        assert torch.equal(loss_fn.running_min, exact)
    assert loss_fn(features, output, target).isfinite()
    copied = copy.deepcopy(loss_fn)
    copied(features * 0.1, output, target)
    assert torch.equal(loss_fn.running_min, exact)


def test_scores_on_the_meta_device_leave_the_state_where_it_is() -> None:
    loss_fn = FusedBiasLoss()
    features, output, target = batch()
    loss_fn(features, output, target)
    before = loss_fn.running_min.clone()
    loss = loss_fn(*(t.detach().to("meta") for t in (features, output, target)))
    assert loss.device.type == "meta"
    assert torch.equal(loss_fn.running_min, before)


def test_built_without_memory() -> None:
    features, output, target = batch()
    expected = FusedBiasLoss()(features, output, target)
    with torch.device("meta"):
        used, emptied, reset = FusedBiasLoss(), nn.ModuleList([FusedBiasLoss()]), FusedBiasLoss()
    assert torch.equal(used(features, output, target), expected)
    emptied.to_empty(device="cpu")
    assert torch.equal(emptied[0](features, output, target), expected)
    reset.to_empty(device="cpu").running_min.fill_(-7.0)
    reset.reset_parameters()
    assert torch.equal(reset.running_min, torch.tensor(torch.inf))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32])
def test_assigned_state_of_another_dtype(dtype: torch.dtype) -> None:
    features, output, target = batch()
    loss_fn = FusedBiasLoss()
    loss_fn.load_state_dict({"running_min": torch.tensor(0, dtype=dtype)}, assign=True)
    assert loss_fn.running_min.dtype == torch.float32
    expected = functional.bias_loss(features, output, target, torch.tensor(0.0)).loss
    assert torch.equal(loss_fn(features, output, target), expected)
    loss_fn.running_min = torch.tensor(0, dtype=dtype)
    assert torch.equal(loss_fn(features, output, target), expected)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("normalisation_mode", "gobal", ValueError),
        ("alpha", -1, ValueError),
        ("alpha", "0.3", TypeError),
        ("beta", 1.0, ValueError),
        ("beta", None, TypeError),
        ("reduction", "avg", ValueError),
        ("label_smoothing", 1.5, ValueError),
        ("label_smoothing", float("nan"), ValueError),
        ("ignore_index", 0.5, TypeError),
        ("ignore_index", 2**64, ValueError),
        ("backend", "gpu", ValueError),
    ],
)
def test_options_are_checked_where_they_are_set(name: str, value: object, error: type[Exception]) -> None:
    loss_fn = FusedBiasLoss()
    before = getattr(loss_fn, name)
    with pytest.raises(error, match=name):
        setattr(loss_fn, name, value)
    assert getattr(loss_fn, name) == before
    if name != "backend":
        with pytest.raises(error, match=name):
            functional.bias_loss(*batch(), **{name: value})  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    features, output, target = batch()
    target[0] = 1
    options = {"alpha": 0.5, "beta": 0.25, "label_smoothing": 0.125, "ignore_index": 1}
    expected = FusedBiasLoss(**options)(features, output, target)
    of_numpy = {name: (np.float32 if isinstance(value, float) else np.int64)(value) for name, value in options.items()}
    assert torch.equal(FusedBiasLoss(**of_numpy)(features, output, target), expected)
    assert torch.equal(functional.bias_loss(features, output, target, **of_numpy).loss, expected)
    loss_fn = FusedBiasLoss(alpha=np.float16(0.5), beta=np.float64(0.25), label_smoothing=np.float32(0.125))
    loss_fn.ignore_index = np.int32(1)
    assert torch.equal(loss_fn(features, output, target), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    body, head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
    images, target = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    loss_fn = FusedBiasLoss()
    with torch.autocast("cpu", dtype):
        features = body(images)
        output = head(features.mean((2, 3)))
        loss = loss_fn(features, output, target)
    assert features.dtype == output.dtype == dtype
    assert loss.dtype == torch.float32
    exact = oracle.bias_loss(oracle.variance(features), output, target)
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-5, atol=0)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


def test_gradient_accumulation_adds_up() -> None:
    loss_fn = FusedBiasLoss(normalisation_mode="local", reduction="sum")
    features, output, target = batch()
    loss_fn(features, output, target).backward()
    loss_fn(features, output, target).backward()
    assert output.grad is not None
    once = output.detach().clone().requires_grad_()
    loss_fn(features, once, target).backward()
    assert once.grad is not None
    torch.testing.assert_close(output.grad, 2 * once.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_model(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    body, head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
    images, target = torch.randn(6, 3, 8, 8, requires_grad=True), torch.randint(5, (6,))
    results = []
    for recompute in (False, True):
        loss_fn = FusedBiasLoss()

        def step(images: Tensor, loss_fn: FusedBiasLoss = loss_fn) -> Tensor:
            features = body(images).relu()
            return loss_fn(features, head(features.mean((2, 3))), target)

        loss = checkpoint(step, images, use_reentrant=use_reentrant) if recompute else step(images)
        images.grad = None
        loss.backward()
        results.append((loss, images.grad, loss_fn.running_min))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_mixed_with_another_loss() -> None:
    """A gradient that arrives scaled, and one that never arrives."""
    features, output, target = batch()
    loss, _ = FusedBiasLoss()(features, output, target, return_weights=True)
    (3 * loss + F.cross_entropy(output, target)).backward()
    exact = oracle.bias_loss(oracle.variance(features), output, target)
    scores = output.detach().double().requires_grad_()
    (plain,) = torch.autograd.grad(F.cross_entropy(scores, target), scores)
    assert output.grad is not None
    torch.testing.assert_close(output.grad.double(), 3 * exact.gradient / 0.5 + plain, rtol=1e-4, atol=1e-6)


def test_gradcheck() -> None:
    features, output, target = batch()
    wide = output.detach().double().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):
            loss_fn = FusedBiasLoss(reduction=reduction, label_smoothing=smoothing, backend=KERNELS).eval()
            assert torch.autograd.gradcheck(lambda scores, fn=loss_fn: fn(features, scores, target), wide)


def test_functional_twin_agrees_and_has_no_state() -> None:
    loss_fn = FusedBiasLoss()
    running_min = None
    for seed in range(3):
        features, output, target = batch(seed)
        result = functional.bias_loss(features, output, target, running_min)
        assert torch.equal(result.loss, loss_fn(features, output, target))
        running_min = result.running_min
        assert running_min is not None
        assert torch.equal(running_min, loss_fn.running_min)


def test_repr_and_bad_construction() -> None:
    assert repr(FusedBiasLoss(label_smoothing=0.1)) == (
        "FusedBiasLoss(alpha=0.3, beta=0.3, normalisation_mode='global', reduction='mean', label_smoothing=0.1)"
    )
    with pytest.raises(ValueError, match="unknown backend 'gpu'; there are: auto, reference, cpu, cuda, triton"):
        FusedBiasLoss(backend="gpu")
    with pytest.raises(ValueError, match="alpha must be finite and at least 0"):
        FusedBiasLoss(-1.0)
