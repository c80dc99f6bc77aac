"""The demo at a tiny size: it runs, and its report has what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from biasloss_ext import demo


def test_runs_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "biasloss_ext.demo", "--out", str(tmp_path), "--epochs", "3", "--repeats", "2"]
    # One thread: the other tests have the rest of the machine.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert (tmp_path / "weights.png").stat().st_size > 1000
    for word in ("| bias |", "| cross-entropy |", "paired by seed", "published formulation", "128 x 960 x 7 x 7"):
        assert word in report


def test_verdict_claims_nothing_within_the_spread() -> None:
    assert demo.verdict([98.0, 99.0, 97.0], [98.1, 98.0, 97.5]).endswith("No difference is shown.")
    assert demo.verdict([98.0, 98.0, 98.0], [98.0, 98.0, 98.0]).endswith("No difference is shown.")
    assert "larger than the seeds' spread" in demo.verdict([99.0, 99.1, 99.0], [97.0, 97.0, 97.1])


def test_learns_more_than_chance() -> None:
    run = demo.train(demo.load_digits(), "bias", 0, 4, lambda _: None)
    assert run.accuracy[-1] > 0.9
    assert len(run.weights) == 4
    assert all(low <= middle <= high for low, middle, high in run.weights)
    assert run.weights[0][0] == pytest.approx(0.7, abs=0.15)  # the smallest variance weighs 1 - beta
