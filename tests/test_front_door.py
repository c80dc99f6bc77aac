"""Every backend that can run here, entered as a user does, in a fresh process: no test has prepared anything for it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from biasloss_ext.ops import FAMILIES
from biasloss_ext.ops.registry import OPS
from tests.runnable import imported

ROOT = Path(__file__).parents[1]
SIMULATED_GPU = os.environ.get("BIASLOSS_SIMULATED_GPU", "")
without_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
without_simulator = pytest.mark.skipif(not SIMULATED_GPU, reason="BIASLOSS_SIMULATED_GPU names no library")

# The backend by name, and the variables that make it run on CPU tensors.
CPU = pytest.param("cpu", {}, id="cpu")
CUDA = pytest.param(
    "cuda",
    {"BIASLOSS_SIMULATED_GPU": SIMULATED_GPU, "TRITON_INTERPRET": "1"},
    id="cuda",
    marks=[without_triton, without_simulator],
)
BACKENDS = [
    pytest.param("reference", {}, id="reference"),
    CPU,
    pytest.param("triton", {"TRITON_INTERPRET": "1"}, id="triton", marks=without_triton),
    CUDA,
]
# Of the networks, how often each is drawn: interpreted kernels take a minute for one step.
DRAWS = {"cpu": 4, "cuda": 1}


def said_by_a_user(backend: str, variables: dict[str, str], *networks: str) -> str:
    """All that was done, each within twice PyTorch's own error."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BIASLOSS_SIMULATED_GPU")}
    user = ("-m", "tests.front_door_user", backend, str(DRAWS.get(backend, 0)), *networks)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *user],
        cwd=ROOT,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [entry for entry in found if not entry["error"] <= entry["allowed"]]
    assert not wrong, wrong
    return " ".join(entry["what"] for entry in found)


@pytest.mark.parametrize(("backend", "variables"), BACKENDS)
def test_everything_runs_and_agrees_with_float64(backend: str, variables: dict[str, str]) -> None:
    said = said_by_a_user(backend, variables)
    for name, op in OPS.items():
        assert (f": {name}," in said) == (backend in op.backends), name
    assert {f"{op.family}:" for op in OPS.values() if backend in op.backends} <= set(said.split())
    for call in ("FusedBiasLoss()", "functional.bias_loss", "functional.feature_variance"):
        assert call in said
    assert ("nn.DepthwiseConv2d" in said) == (backend in OPS["depthwise"].backends)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["skipblocknet_xs", "blocks of other libraries", "torchvision", "timm"])
@pytest.mark.parametrize(("backend", "variables"), [CPU, CUDA])  # elsewhere "auto" takes another
def test_networks_agree_with_float64(backend: str, variables: dict[str, str], network: str) -> None:
    """On what "auto" takes: a training step, evaluation, and inference."""
    if network in ("torchvision", "timm"):
        imported(network)
    assert said_by_a_user(backend, variables, network).count(network) == 4


def test_every_family_is_entered() -> None:
    """By one backend with kernels or more; the reference has all."""
    assert {op.family for op in OPS.values() if len(op.backends) > 1} == set(FAMILIES)
