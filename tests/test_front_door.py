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

ROOT = Path(__file__).parents[1]
SIMULATED_GPU = os.environ.get("BIASLOSS_SIMULATED_GPU", "")
without_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
without_simulator = pytest.mark.skipif(not SIMULATED_GPU, reason="BIASLOSS_SIMULATED_GPU names no library")

# The backend by name, the variables that make it run on CPU tensors, and for how many draws the network is trained on what
# "auto" takes there; none where "auto" would take another backend.
BACKENDS = [
    pytest.param("reference", {}, 0, id="reference"),
    pytest.param("cpu", {}, 4, id="cpu"),
    pytest.param("triton", {"TRITON_INTERPRET": "1"}, 0, id="triton", marks=without_triton),
    pytest.param(
        "cuda",
        {"BIASLOSS_SIMULATED_GPU": SIMULATED_GPU, "TRITON_INTERPRET": "1"},
        1,
        id="cuda",
        marks=[without_triton, without_simulator],
    ),
]


@pytest.mark.parametrize(("backend", "variables", "draws"), BACKENDS)
def test_everything_runs_and_agrees_with_float64(backend: str, variables: dict[str, str], draws: int) -> None:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BIASLOSS_SIMULATED_GPU")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.front_door_user", backend, str(draws)],
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
    said = " ".join(entry["what"] for entry in found)
    for name, op in OPS.items():
        assert (f": {name}," in said) == (backend in op.backends), name
    assert {f"{op.family}:" for op in OPS.values() if backend in op.backends} <= set(said.split())
    for call in ("FusedBiasLoss()", "functional.bias_loss", "functional.feature_variance"):
        assert call in said
    assert ("nn.DepthwiseConv2d" in said) == (backend in OPS["depthwise"].backends)
    assert said.count("skipblocknet_xs") == (4 if draws else 0)


def test_every_family_is_entered() -> None:
    """By one backend with kernels or more; the reference has all."""
    assert {op.family for op in OPS.values() if len(op.backends) > 1} == set(FAMILIES)
