"""The Triton kernels on a machine without a GPU, under Triton's interpreter.

Triton decides at its import whether kernels are compiled or interpreted, and other tests of this process compile them; so
each group of files runs in a process of its own. To run one by hand, from the folder `tests`:

    TRITON_INTERPRET=1 PYTHONPATH=triton_interpreter python -m pytest -p on_triton ops/test_bias_loss.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
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
OPTIONS = ("-p", "on_triton", "-p", "no:cacheprovider", "-q", "-W", "ignore")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    search_path = [str(TESTS.parent), str(TESTS / "triton_interpreter"), os.environ.get("PYTHONPATH", "")]
    environment = {**inherited, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, search_path))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *GROUPS[group]],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
