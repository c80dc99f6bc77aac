"""The demo at a tiny size: it runs, and its report has what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from biasloss_ext.demo.timings import time_losses, timing_lines, turns


def test_runs_and_reports(tmp_path: Path) -> None:
    sizes = ["--epochs", "1", "--seeds", "2", "--repeats", "2"]
    command = [sys.executable, "-m", "biasloss_ext.demo", "--out", str(tmp_path), *sizes]
    # One thread: the other tests have the rest of the machine.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"seed \d  epoch 1/1", done.stdout)) == 4
    report = (tmp_path / "report.md").read_text()
    for words in (
        "| skipblocknet_xs | bias |",
        "| skipblocknet_xs | ce |",
        "skipblocknet_xs with bias minus skipblocknet_xs with ce",
        "| conv | skipblocknet_xs-ce-seed0 |",
        "published formulation",
        "128 x 960 x 7 x 7",
    ):
        assert words in report
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(pictures) == 3
    for picture in pictures:
        assert (tmp_path / picture).stat().st_size > 1000


def test_timings_take_turns_and_are_set_against_the_first() -> None:
    counted = []
    timings = time_losses(1, lambda: counted.append(1))
    assert len(counted) == turns(1)
    assert len(timings) == 4
    lines = timing_lines([("a shape", {"ours": 2.0, "other": 3.0})])
    assert lines[-1] == "| a shape | 2.000 (1.00) | 3.000 (1.50) |"
