"""Arguments and orders of calls that no one plans for: each gives what torch's own loss gives, or an error that says why."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biasloss_ext import FusedBiasLoss, bias_weight, feature_variance
from biasloss_ext.functional import bias_loss

OPS = torch.ops.biasloss_ext


def batch(samples: int = 16, classes: int = 5, *positions: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, 6, generator=generator)
    output = torch.randn(samples, classes, *positions, generator=generator).requires_grad_()
    return features, output, torch.randint(classes, (samples, *positions), generator=generator)


def forward_op(**changed: Any) -> tuple[Tensor, Tensor, Tensor]:
    features, output, target = batch()
    arguments = {
        "features": features, "variance": None, "extrema": None, "output": output.detach(), "target": target,
        "class_weight": None, "running_min": None, "alpha": 0.3, "beta": 0.3, "update_running_min": False,
        "reduction": 1, "ignore_index": -100, "label_smoothing": 0.0,
    }  # fmt: skip
    result: tuple[Tensor, Tensor, Tensor] = OPS.bias_loss(**{**arguments, **changed})
    return result


# --- classes that change between forward and backward


@pytest.mark.parametrize("shape", [(64, 5), (64, 20), (64, 300), (8, 5, 33), (8, 300, 9), (8, 5, 3, 4), (8, 200, 2)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_that_change_before_the_backward_pass(shape: tuple[int, ...], dtype: type, smoothing: float) -> None:
    """A loader that uses its buffer again."""
    bounds = np.iinfo(dtype)
    for value in {shape[1] if shape[1] <= bounds.max else bounds.max, bounds.max, max(bounds.min, -5), bounds.min}:
        if 0 <= value < shape[1]:
            continue
        labels = np.zeros((shape[0], *shape[2:]), dtype=dtype)
        output = torch.randn(shape, requires_grad=True)
        loss = FusedBiasLoss(label_smoothing=smoothing)(torch.randn(shape[0], 6), output, torch.from_numpy(labels))
        labels[3:] = value
        with pytest.raises(IndexError, match=rf"target of sample 3 is {value}, expected a class in \[0, {shape[1]}\)"):
            loss.backward()


def test_labels_that_become_other_valid_classes() -> None:
    features, output, _ = batch()
    labels = np.zeros(16, dtype=np.int64)
    loss = FusedBiasLoss(reduction="sum")(features, output, torch.from_numpy(labels))
    labels[:] = 4
    loss.backward()
    once = output.detach().requires_grad_()
    FusedBiasLoss(reduction="sum")(features, once, torch.from_numpy(labels)).backward()
    assert torch.equal(output.grad, once.grad)


def test_the_backward_op_checks_classes() -> None:
    _, output, target = batch()
    loss, weight, statistics = forward_op()
    wrong = target.clone()
    wrong[7] = 5
    with pytest.raises(IndexError, match=r"target of sample 7 is 5, expected a class in \[0, 5\)"):
        OPS.bias_loss_backward(loss, output.detach(), wrong, None, weight, statistics, 1, -100, 0.0)
    gradient = OPS.bias_loss_backward(loss, output.detach(), wrong, None, weight, statistics, 1, 5, 0.0)
    assert torch.equal(gradient[7], torch.zeros(5))  # ignore_index may be any number


# --- calls of the ops themselves


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(4, 0),
        torch.zeros(0, 3, 0),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.bool),
        torch.zeros(4, 4, dtype=torch.complex64),
        torch.tensor(1.0),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_variance_op_checks_features(features: Tensor) -> None:
    with pytest.raises(RuntimeError, match="feature_variance: expected"):
        OPS.feature_variance(features)


def test_variance_op_of_no_samples() -> None:
    variance, extrema = OPS.feature_variance(torch.zeros(0, 3))
    assert variance.shape == (0,)
    assert extrema.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("name", ["extrema", "features", "target", "class_weight", "running_min"])
def test_one_tensor_without_memory_is_an_error(name: str) -> None:
    shapes = {"extrema": (2,), "features": (16, 6), "target": (16,), "class_weight": (5,), "running_min": ()}
    dtype = torch.int64 if name == "target" else torch.float32
    with pytest.raises(ValueError, match="expects all tensors on one device, got"):
        forward_op(**{name: torch.empty(shapes[name], dtype=dtype, device="meta")})


@pytest.mark.parametrize(
    "changed",
    [
        {"output": torch.zeros(16, 0)},
        {"output": torch.zeros(16)},
        {"output": torch.zeros(16, 5, dtype=torch.int64)},
        {"target": torch.zeros(15, dtype=torch.int64)},
        {"target": torch.zeros((), dtype=torch.int64)},
        {"target": torch.zeros(16, dtype=torch.int16)},
        {"extrema": torch.zeros(3)},
        {"extrema": torch.zeros(2, dtype=torch.float64)},
        {"variance": torch.zeros(16)},
        {"features": torch.zeros(16, 0)},
        {"features": torch.zeros(16, 2, dtype=torch.int32)},
        {"class_weight": torch.zeros(4)},
        {"running_min": torch.zeros(2)},
        {"running_min": torch.zeros((), dtype=torch.float64)},
    ],
    ids=lambda changed: ",".join(f"{name}={list(value.shape)}{value.dtype}" for name, value in changed.items()),
)
def test_loss_op_checks_its_arguments(changed: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="bias_loss: "):
        forward_op(**changed)


@pytest.mark.parametrize("extrema", [(torch.nan, 1.0), (0.0, torch.nan), (torch.inf, torch.inf), (-torch.inf, 3.0)])
def test_extrema_that_are_not_finite_make_the_loss_nan(extrema: tuple[float, float]) -> None:
    running_min = torch.tensor(2.0)
    loss, weight, _ = forward_op(extrema=torch.tensor(extrema), running_min=running_min, update_running_min=True)
    assert loss.isnan()
    assert weight.isnan().all()
    assert running_min.item() == 2.0


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**40, 10, 300])
def test_huge_ignore_index(value: int) -> None:
    features, output, target = batch()
    expected = FusedBiasLoss()(features, output, target)
    assert torch.equal(FusedBiasLoss(ignore_index=value)(features, output, target), expected)


# --- values that the caller changes between forward and backward


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_may_be_changed(reduction: str) -> None:
    features, output, target = batch()
    loss, weight = FusedBiasLoss(reduction=reduction)(features, output, target, return_weights=True)
    (expected,) = torch.autograd.grad(loss, output, retain_graph=True)
    weight /= weight.max()
    (after,) = torch.autograd.grad(loss, output, retain_graph=True)
    weight.data.zero_()
    (again,) = torch.autograd.grad(loss, output)
    assert torch.equal(after, expected)
    assert torch.equal(again, expected)
    result = bias_loss(features, output, target)
    (expected,) = torch.autograd.grad(result.loss, output, retain_graph=True)
    result.weight.mul_(3)
    assert torch.equal(torch.autograd.grad(result.loss, output)[0], expected)


@pytest.mark.parametrize("changed", ["class_weight", "output", "target", "probabilities", "weight", "statistics"])
def test_other_changes_raise(changed: str) -> None:
    features, output, target = batch()
    class_weight = torch.ones(5)
    scores = output * 1
    probabilities = torch.softmax(torch.randn(16, 5), 1)
    if changed in ("weight", "statistics"):
        loss, weight, statistics = forward_op(output=output)
    else:
        against = probabilities if changed == "probabilities" else target
        loss = FusedBiasLoss(weight=class_weight)(features, scores, against)
    tensors = {"class_weight": class_weight, "output": scores, "target": target, "probabilities": probabilities}
    if changed in ("weight", "statistics"):
        tensors |= {"weight": weight, "statistics": statistics}
    with torch.no_grad():
        tensors[changed].mul_(2 if changed != "target" else 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_features_and_variance_may_be_changed() -> None:
    features, output, target = batch()
    variance = feature_variance(features)
    for given in (features, None):
        loss = FusedBiasLoss()(given, output, target, variance=None if given is not None else variance)
        (expected,) = torch.autograd.grad(loss, output, retain_graph=True)
        (variance if given is None else features).zero_()
        assert torch.equal(torch.autograd.grad(loss, output)[0], expected)


# --- exactness


def errors_of(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("classes", [2, 3, 21, 48, 49, 128, 129, 1000, 50257, 250000])
@pytest.mark.parametrize("kind", ["equal", "random", "confident"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, "probabilities"])
def test_error_within_twice_that_of_torch(classes: int, kind: str, smoothing: float | str) -> None:
    generator = torch.Generator().manual_seed(classes)
    for positions in ((), (9,)) if classes <= 1000 else ((),):
        shape = (9 if classes <= 1000 else 2, classes, *positions)
        scores = torch.zeros(shape) if kind == "equal" else torch.randn(shape, generator=generator)
        target = torch.randint(classes, (shape[0], *positions), generator=generator)
        if kind == "confident":
            scores.scatter_(1, target.unsqueeze(1), 12.0)
        if smoothing == "probabilities":
            target = torch.softmax(3 * torch.randn(shape, generator=generator), 1)
        options = {"label_smoothing": smoothing} if isinstance(smoothing, float) else {}
        given = {"reduction": "none", "label_smoothing": options.get("label_smoothing", 0.0)}

        def losses_and_gradient(function: Any, dtype: torch.dtype, scores: Tensor = scores) -> tuple[Tensor, Tensor]:
            leaf = scores.detach().to(dtype).requires_grad_()
            losses = function(leaf)
            losses.sum().backward()
            assert leaf.grad is not None
            return losses.detach(), leaf.grad

        def of_torch(scores: Tensor, target: Tensor = target, given: dict[str, Any] = given) -> Tensor:
            soft = target.to(scores.dtype) if target.is_floating_point() else target
            return F.cross_entropy(scores, soft, **given)

        def of_ours(scores: Tensor, target: Tensor = target, given: dict[str, Any] = given) -> Tensor:
            variance = torch.ones(scores.shape[0])  # equal: every weight is 1 with beta=0
            return bias_loss(None, scores, target, variance=variance, beta=0.0, backend="cpu", **given).loss

        exact = losses_and_gradient(of_torch, torch.float64)
        for own, their, right in zip(
            losses_and_gradient(of_ours, torch.float32),
            losses_and_gradient(of_torch, torch.float32),
            exact,
            strict=True,
        ):
            # Half a unit in the last place is nobody's fault.
            assert errors_of(own, right) <= 2 * max(errors_of(their, right), 2.0**-24)


# --- layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(70, 2), (70, 3), (33, 10), (19, 40), (3, 4, 70), (2, 15, 9), (2, 130, 33), (3, 17, 1)]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "transposed"])
def test_every_layout_has_the_same_result(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    _, output, target = batch(*shape)
    target.view(-1)[::5] = -100
    plain = output.detach().to(dtype)
    if layout == "channels_last":
        moved = plain.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "gaps":
        moved = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype)[..., ::2].copy_(plain)
    elif layout == "transposed":
        moved = plain.transpose(0, -1).contiguous().transpose(0, -1)
    else:
        moved = plain
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.linspace(0.5, 2, shape[1])}, {"reduction": "none"}):
        variance = torch.linspace(0.5, 2, shape[0])
        results = []
        for scores in (moved, plain.double()):
            leaf = scores.detach().requires_grad_()
            backend = "reference" if scores.dtype == torch.float64 and dtype != torch.float64 else "cpu"
            result = bias_loss(None, leaf, target, variance=variance, backend=backend, **options)  # type: ignore[arg-type]
            result.loss.sum().backward()
            assert leaf.grad is not None
            results += [result.loss.detach().double(), leaf.grad.double()]
        rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-6)
        torch.testing.assert_close(results[0], results[2], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(results[1], results[3], rtol=max(rounding, 2e-5), atol=1e-6)


# --- arguments of the Python functions


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ignore_index", [0, 1, 5, 255])
def test_ignore_index_with_probabilities(backend: str, ignore_index: int) -> None:
    features, output, _ = batch()
    with pytest.raises(ValueError, match=f"got ignore_index={ignore_index} with probability targets"):
        FusedBiasLoss(ignore_index=ignore_index, backend=backend)(features, output, torch.softmax(output.detach(), 1))


@pytest.mark.parametrize("value", [5, -1, 10**6, -(2**63)])
@pytest.mark.parametrize("positions", [(), (3,), (3, 2)])
def test_class_out_of_range_of_the_reference(value: int, positions: tuple[int, ...]) -> None:
    features, output, target = batch(16, 5, *positions)
    target.view(16, -1)[2, -1] = value
    for backend in ("reference", "cpu"):
        with pytest.raises(IndexError, match=rf"target of sample 2 is {value}, expected a class in \[0, 5\)"):
            FusedBiasLoss(backend=backend)(features, output, target)


def test_class_out_of_range_under_compile() -> None:
    features, output, target = batch()
    compiled = torch.compile(FusedBiasLoss(), backend="aot_eager", fullgraph=True)
    compiled(features, output, target).backward()
    target[4] = 9
    with pytest.raises(IndexError, match=r"target of sample 4 is 9, expected a class in \[0, 5\)"):
        compiled(features, output, target)


def test_probabilities_that_require_a_gradient() -> None:
    features, output, _ = batch()
    logits = torch.randn(16, 5, requires_grad=True)
    for backend in ("cpu", "auto"):
        with pytest.raises(ValueError, match=r"target requires a gradient.*target.detach\(\), or backend='reference'"):
            FusedBiasLoss(backend=backend)(features, output, torch.softmax(logits, 1))
    with torch.no_grad():
        FusedBiasLoss(backend="cpu")(features, output, torch.softmax(logits, 1).requires_grad_())
    FusedBiasLoss(backend="reference")(features, output, torch.softmax(logits, 1)).backward()
    assert logits.grad is not None


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.zeros(16), ValueError),
        (torch.zeros(1), ValueError),
        (0.5, TypeError),
        (torch.tensor(1), TypeError),
        (torch.zeros((), device="meta"), ValueError),
        ([0.5], TypeError),
    ],
    ids=str,
)
def test_running_minimum_of_functions_is_checked(value: Any, error: type[Exception]) -> None:
    features, output, target = batch()
    with pytest.raises(error, match="running_min"):
        bias_weight(feature_variance(features), value)
    if not (isinstance(value, Tensor) and value.is_meta):
        with pytest.raises(error, match="running_min"):
            bias_loss(features, output, target, value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_running_minimum_that_is_nan_does_not_stay(backend: str) -> None:
    features, output, target = batch()
    expected = bias_loss(features, output, target, backend=backend)
    result = bias_loss(features, output, target, torch.tensor(torch.nan), backend=backend)
    assert torch.equal(result.loss, expected.loss)
    assert result.running_min is not None
    assert expected.running_min is not None
    assert torch.equal(result.running_min, expected.running_min)
    assert torch.equal(
        bias_weight(feature_variance(features), torch.tensor(torch.nan)), bias_weight(feature_variance(features))
    )


# --- transforms and tracing


def loss_of(backend: str) -> Any:
    features, _, target = batch()
    return lambda scores: bias_loss(features, scores, target, backend=backend).loss


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vjp, torch.func.jacrev, torch.func.hessian])
def test_torch_func(transform: Any) -> None:
    _, output, _ = batch()
    arguments = (output.detach(),)

    def result(backend: str) -> Any:
        if transform is torch.func.vjp:
            return torch.func.vjp(loss_of(backend), *arguments)[1](torch.tensor(1.0))[0]
        return transform(loss_of(backend))(*arguments)

    torch.testing.assert_close(result("auto"), result("reference"))
    with pytest.raises(RuntimeError, match="backend='reference'"):
        result("cpu")


def test_jvp() -> None:
    _, output, _ = batch()
    tangent = torch.ones(16, 5)
    loss, change = torch.func.jvp(loss_of("auto"), (output.detach(),), (tangent,))
    torch.testing.assert_close(change, torch.zeros(()), rtol=0, atol=1e-6)  # a common shift changes no loss
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.jvp(loss_of("cpu"), (output.detach(),), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(output.detach(), tangent)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            loss_of("cpu")(dual)
    torch.testing.assert_close(loss, loss_of("cpu")(output.detach()))


def test_vmap() -> None:
    features, output, target = batch()
    stacked = torch.stack((output.detach(), 2 * output.detach()))
    variance = feature_variance(features)

    def loss(scores: Tensor, backend: str = "auto") -> Tensor:
        return bias_loss(None, scores, target, variance=variance, normalisation_mode="local", backend=backend).loss

    torch.testing.assert_close(torch.func.vmap(loss)(stacked), torch.stack([loss(scores) for scores in stacked]))
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.vmap(lambda scores: loss(scores, "cpu"))(stacked)


def test_jit_trace() -> None:
    features, output, target = batch()
    loss_fn = FusedBiasLoss().eval()
    traced = torch.jit.trace(loss_fn, (features, output.detach(), target), check_trace=False)
    other = torch.randn(16, 5)
    torch.testing.assert_close(traced(features, other, target), loss_fn(features, other, target))


# --- the environment


@pytest.mark.parametrize("value", ["AVX2", "avx2 "])
def test_unknown_instruction_set(value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import biasloss_ext"],
        env={**os.environ, "BIASLOSS_CPU_ISA": value, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"BIASLOSS_CPU_ISA must be baseline, avx2 or avx512, got '{value}'" in done.stderr
