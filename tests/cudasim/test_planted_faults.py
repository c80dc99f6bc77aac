"""Mistakes planted in the launchers, which the tests on the simulated GPU must see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cudasim import sanitizers
from tests.cudasim.simulated_gpu import Fault, build
from tests.cudasim.test_simulated_gpu import EVERYTHING, OPTIONS, ROOT, SLOW, UNDER_SANITIZERS, variables

LOSS, VARIANCE = "bias_loss/cuda.cu", "feature_variance/cuda.cu"
FORWARD, BACKWARD = "depthwise/cuda_forward.cu", "depthwise/cuda_backward.cu"
ROUNDED = "return is_probability(kind_of(target, output)) ? with_dtype(target, output.scalar_type()) : target;"
FAULTS = {
    "variance: stride of another dimension": Fault(
        VARIANCE, "features.stride(0), activations", "features.stride(features.dim() - 1), activations"
    ),
    "variance: a block too few": Fault(VARIANCE, "dim3(static_cast<unsigned>(blocks))", "dim3(unsigned(blocks) - 1)"),
    "loss: positions by the stride of classes": Fault(
        LOSS, "t.dim() == 3 ? t.stride(2) : 0}", "t.dim() == 3 ? t.stride(1) : 0}"
    ),
    "loss: one chunk of classes": Fault(LOSS, "dim3(plan.blocks, plan.chunks)", "dim3(plan.blocks, 1)"),
    "loss: probabilities rounded to the dtype of the scores": Fault(
        LOSS,
        "if (is_probability(kind_of(target, output)) || target.is_contiguous()) return target;",
        f"if (is_probability(kind_of(target, output)) || target.is_contiguous()) {ROUNDED}",
    ),
    "loss: a block too few": Fault(
        LOSS, "dim3(static_cast<unsigned>(blocks)), plan.feature", "dim3(unsigned(blocks) - 1), plan.feature"
    ),
    "loss: gradient of positions by the stride of samples": Fault(
        LOSS, "grad_loss.dim() > 1 ? grad_loss.stride(1)", "grad_loss.dim() > 1 ? grad_loss.stride(0)"
    ),
    "depthwise: one slab of channels": Fault(
        FORWARD, "dim3(plan.slabs, plan.blocks_of_slab)", "dim3(1, plan.blocks_of_slab)"
    ),
    "depthwise: a block too few": Fault(FORWARD, "plan.blocks_of_slab)", "plan.blocks_of_slab - 1)"),
    "depthwise: moments over the positions of the input": Fault(
        FORWARD, "(f.norm, shape.y.rows(), f.statistics)", "(f.norm, shape.x.rows(), f.statistics)"
    ),
    "depthwise: the output cut as the input": Fault(
        FORWARD, "(context, shape.y, shape.x, {p.x, p.y})", "(context, shape.x, shape.x, {p.x, p.y})"
    ),
    "depthwise_backward: a block too few": Fault(BACKWARD, "plan.blocks_of_slab)", "plan.blocks_of_slab - 1)"),
    "depthwise_backward: the pool over the positions of the input": Fault(
        BACKWARD, "static_cast<Acc>(shape.y.positions())", "static_cast<Acc>(shape.x.positions())"
    ),
    "depthwise_backward: one slab of channels": Fault(
        BACKWARD, "dim3(plan.slabs, plan.blocks_of_slab)", "dim3(1, plan.blocks_of_slab)"
    ),
}
# Workspaces too short, which only a sanitizer sees for sure.
SHORT_WORKSPACES = {
    "variance": Fault(VARIANCE, "{3 * blocks}", "{3 * blocks - 1}"),
    "loss": Fault(LOSS, "{5 * blocks + scores.samples}", "{5 * blocks + scores.samples - 1}"),
    "depthwise": Fault(FORWARD, "plan.partial_values(kRowsOfMoments)", "plan.partial_values(kRowsOfMoments) - 1"),
    "depthwise_backward": Fault(
        BACKWARD, "plan.partial_values(Tiling::kTaps + 2)", "plan.partial_values(Tiling::kTaps + 2) - 1"
    ),
}
FILES = (
    "tests/simulated_gpu/test_loss_launches.py",
    "tests/ops/test_registry.py",
    "tests/ops/test_depthwise.py",
    "tests/ops/test_bias_loss.py",
)
pytestmark = [pytest.mark.usefixtures("compilers"), pytest.mark.slow]


def selection(fault: Fault) -> list[str]:
    """The tests of the faulty op, of those that CI runs."""
    op = {"bias_loss": "loss", "feature_variance": "variance", "depthwise": "depthwise"}[Path(fault.file).parent.name]
    return [*FILES, "-k", f"{op} and {SLOW}", "--fill-with-nan", "--examples=10"]


def only_with_everything(names: Iterator[str]) -> list[object]:
    skipped = pytest.mark.skipif(not EVERYTHING, reason="compiles for long; `make test-simulated` runs it")
    return [pytest.param(name, marks=skipped) for name in names]


@pytest.mark.parametrize("name", only_with_everything(iter(FAULTS)))
def test_a_fault_is_seen(name: str) -> None:
    fault = FAULTS[name]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *selection(fault)],
        cwd=ROOT,
        env={**os.environ, **variables(build(fault=fault), multiprocessors=132)},
        capture_output=True,
        text=True,
        check=False,
    )
    crashed = done.returncode < 0  # outside of the memory of the process
    assert crashed or (done.returncode == 1 and "1 failed" in done.stdout), done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("op", only_with_everything(iter(SHORT_WORKSPACES)))
def test_a_workspace_that_is_too_short_is_seen(op: str) -> None:
    sanitizers.runtime("libasan.so")
    fault = SHORT_WORKSPACES[op]
    environment = variables(build(sanitize=True, fault=fault), multiprocessors=132)
    selected = ("tests/simulated_gpu", *FILES, "-k", UNDER_SANITIZERS)
    done = sanitizers.run("-m", "pytest", *OPTIONS, "-s", *selected, folder=ROOT, **environment)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
