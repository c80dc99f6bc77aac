"""Every backend that runs on a CPU against float64, over drawn shapes, strides, dtypes and options."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext import functional
from tests import oracle
from tests.runnable import backends_of

BACKENDS = backends_of("bias_loss")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXAMPLES = 60 if os.environ.get("TRITON_INTERPRET") == "1" else 150  # an interpreted one takes a quarter of a second


@dataclass
class Case:
    features: Tensor
    output: Tensor
    target: Tensor
    running_min: Tensor | None
    options: dict[str, Any]


def with_strides(tensor: Tensor, kind: str) -> Tensor:
    """The same values, laid out otherwise."""
    if kind == "contiguous":
        return tensor
    if kind == "transposed":  # the class dimension outermost
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "classes last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "every second sample":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 1).flatten(0, 1)[::2]
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


LAYOUTS = ("contiguous", "transposed", "classes last", "every second sample", "inside a wider tensor")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    samples, classes = draw(st.integers(1, 6)), draw(st.sampled_from((1, 2, 7, 16, 33, 70)))
    positions = draw(st.sampled_from(((), (1,), (5,), (2, 3), (2, 2, 2))))
    maps = draw(st.sampled_from(((1,), (3, 2, 2), (65,), (8, 5, 7), (300, 4, 4))))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    spread = torch.rand((samples, *[1] * len(maps)), generator=generator) + 0.2
    features = (normal(samples, *maps) * spread + draw(st.sampled_from((0.0, 3.0)))).to(draw(st.sampled_from(FLOATS)))
    if features.dim() == 4 and draw(st.booleans()):
        features = features.contiguous(memory_format=torch.channels_last)
    features = with_strides(features, draw(st.sampled_from(LAYOUTS)))
    output = normal(samples, classes, *positions) * draw(st.sampled_from((1.0, 20.0)))
    output = output + draw(st.sampled_from((0.0, 100.0)))
    output = with_strides(output.to(draw(st.sampled_from(FLOATS))), draw(st.sampled_from(LAYOUTS)))
    options: dict[str, Any] = {
        "alpha": draw(st.sampled_from((0.3, 0.0, 2.0))),
        "beta": draw(st.sampled_from((0.3, -0.5))),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 1.0))),
        "ignore_index": -100,
        "weight": draw(st.sampled_from((None, torch.rand(classes, generator=generator) + 0.1))),
    }
    if draw(st.booleans()):
        target = torch.softmax(normal(samples, classes, *positions), 1).to(
            draw(st.sampled_from((output.dtype, *FLOATS)))
        )
        target = with_strides(target, draw(st.sampled_from(LAYOUTS)))
    else:
        target = torch.randint(classes, (samples, *positions), generator=generator)
        options["ignore_index"] = draw(st.sampled_from((-100, 0, 255)))
        ignored = torch.rand(target.shape, generator=generator) < draw(st.sampled_from((0.0, 0.3)))
        dtype = draw(st.sampled_from((torch.int64, torch.int32, torch.uint8)))
        if dtype != torch.uint8 or options["ignore_index"] != -100:
            target = torch.where(ignored, options["ignore_index"], target)
        target = target.to(dtype)
    running_min = draw(st.sampled_from((None, torch.tensor(torch.inf), torch.tensor(0.02), torch.tensor(5.0))))
    return Case(features, output, target, running_min, options)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases())
def test_agrees_with_float64(backend: str, case: Case) -> None:
    scores = case.output.detach().requires_grad_()
    mode = "local" if case.running_min is None else "global"
    loss, weight, moved = functional.bias_loss(
        case.features, scores, case.target, case.running_min, normalisation_mode=mode, backend=backend, **case.options
    )
    (gradient,) = torch.autograd.grad(loss, scores, oracle.grad_of_loss(loss))

    var = oracle.variance(case.features)
    exact = oracle.bias_loss(var, case.output, case.target, case.running_min, **case.options)
    dtype = torch.float64 if case.output.dtype == torch.float64 else torch.float32
    rough = oracle.bias_loss(var, case.output, case.target, case.running_min, dtype=dtype, **case.options)

    assert loss.dtype == weight.dtype == dtype
    assert gradient.dtype == case.output.dtype
    assert loss.shape == exact.loss.shape
    if torch.isnan(exact.loss).any():  # every target is ignored
        assert torch.isnan(loss).all()
        return
    alpha, beta = case.options["alpha"], case.options["beta"]
    # The variance is rounded to the precision of whichever of the two inputs is narrower.
    narrower = torch.float64 if case.features.dtype == dtype == torch.float64 else torch.float32
    error_of_weight = oracle.error_of_weights(
        var, case.running_min, alpha, beta, oracle.variance_error(narrower), dtype
    )
    assert ((weight.double() - exact.weight).abs() <= error_of_weight).all()

    # No weight is near zero: every one is at least 1 - beta.
    relative = (error_of_weight / exact.weight).max().item()
    largest_weight = exact.weight.max().item()
    class_weight = case.options["weight"]
    largest_class_weight = 1.0 if class_weight is None else class_weight.max().item()
    per_position = largest_weight * largest_class_weight
    if case.options["reduction"] == "mean":
        per_position /= float(oracle.denominator(case.output, case.target, class_weight, case.options["ignore_index"]))
    rows = case.output.numel() / case.output.shape[1]
    largest_score = (case.output.double() - case.output.double().amax(1, keepdim=True)).abs().max().item() + 5
    for what, ours, truth, own, scale in (
        ("loss", loss, exact.loss, rough.loss, per_position * largest_score * (1 if loss.dim() else rows)),
        ("gradient", gradient, exact.gradient, rough.gradient.to(gradient.dtype), 1.5 * per_position),
    ):
        oracle.assert_as_close_as_torch(ours, truth, own, scale, what, relative * truth.abs().max().item())
    if moved is None:
        assert exact.running_min is None
    else:
        torch.testing.assert_close(moved.double(), exact.running_min, rtol=1e-5, atol=0)
