"""The Triton kernels on a machine without a GPU, under Triton's interpreter.

Triton decides at its import whether kernels are compiled or interpreted, and other tests of this process compile them; so
each group of files runs in a process of its own. To run one by hand, from the root of the checkout:

    TRITON_INTERPRET=1 python -m pytest -p tests.triton_interpreter.on_triton tests/ops/test_bias_loss.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The tests of every backend, of which the plugin `on_triton` picks those with a backend to choose, and Triton's own.
GROUPS = {
    "every op": ("ops/test_registry.py", "ops/test_finishing.py"),
    "loss": ("ops/test_bias_loss.py", "ops/test_bias_loss_edge_cases.py"),
    "loss kernels": ("ops/test_feature_variance.py", "triton_interpreter/test_triton_kernels.py"),
    "block kernels": (
        "triton_interpreter/test_map_kernels.py",
        "triton_interpreter/test_pointwise_kernels.py",
        "triton_interpreter/test_squeeze_excite_kernels.py",
    ),
}
# NumPy warns where a lane that is not selected divides zero by zero.
OPTIONS = ("-p", "tests.triton_interpreter.on_triton", "-p", "no:cacheprovider", "-q", "-W", "ignore")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=pytest.mark.thorough) if g in ("block kernels", "loss") else g for g in GROUPS]
)
def test_interpreted(group: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *(f"tests/{path}" for path in GROUPS[group])],
        cwd=ROOT,
        env={**inherited, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
