"""The launch budget of a training step on a GPU, and its host time against the plain layers', on the stub of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITH_ATTENTION, WITHOUT, NETWORK = 14, 11, 260


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.launches.measure", "--host"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def launches(found: dict[str, int], kind: str = "") -> int:
    return sum(number for name, number in found.items() if name.startswith(kind))


@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_a_block_stays_within_its_budget(measured: dict[str, Any], width: str) -> None:
    """Forward and backward together; the wide block's weights are too large for one kernel to compute both gradients."""
    for name, budget in (("with attention", WITH_ATTENTION), ("without attention", WITHOUT)):
        found = measured[f"{width} block {name}"]
        assert launches(found, "ours") > 0
        assert launches(found) <= budget, f"{width} block {name}: {found}"


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_the_networks_step_stays_within_its_budget(measured: dict[str, Any], precision: str) -> None:
    found = measured[f"SkipblockNet-M, {precision}"]
    assert launches(found) <= NETWORK, found
    assert launches(found, "torch") <= 60, found


def test_weights_are_cast_in_one_launch(measured: dict[str, Any]) -> None:
    """Under autocast, of all 1x1 convolutions; in float32 there is nothing to cast."""
    found = {name: measured[f"SkipblockNet-M, {name}"] for name in ("float32", "bfloat16 autocast")}
    assert found["bfloat16 autocast"]["torch _foreach_copy_"] == 1
    assert "torch _foreach_copy_" not in found["float32"]


def test_the_host_spends_no_more_time_than_on_the_plain_block(measured: dict[str, Any]) -> None:
    """Of several rounds in which both take turns, the quietest one counts: other processes slow down either."""
    host = measured["host"]
    ratios = {part: min(host[part]) for part in ("forward", "backward")}
    assert all(0 < ratio <= 1 for ratio in ratios.values()), host


def test_another_launch_is_counted() -> None:
    """A kernel of PyTorch's within the step shows, and so does one of ours."""
    script = (
        "import torch\n"
        "from tests.launches import measure, stub\n"
        "stub.install()\n"
        "x = torch.ones(3)\n"
        "found = measure.counted(lambda: x.mul(x).add_(x))\n"
        "assert found == {'torch mul': 1, 'torch add_': 1}, found\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_checkpointed_block_recomputes_what_it_saved() -> None:
    """The recomputation runs outside of the network's forward pass, where no weights are prepared."""
    script = (
        "import torch\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "from tests.launches import stub\n"
        "stub.install()\n"
        "from biasloss_ext.models import skipblocknet_xs\n"
        "model = skipblocknet_xs(num_classes=10, fused=True).train()\n"
        "block, plain = model.blocks[1], model.blocks[1].forward\n"
        "block.forward = lambda x: checkpoint(plain, x, use_reentrant=False)\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    out = model(torch.randn(2, 3, 64, 64))\n"
        "out.float().sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
