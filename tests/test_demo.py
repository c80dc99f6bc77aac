"""The demo at a tiny size: it runs, and its report has what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from biasloss_ext.benchmarks import shapes
from biasloss_ext.demo import timings


@pytest.mark.slow
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
        "authors, eager",
        "128x960x7x7, 1000 classes, channels_last",
    ):
        assert words in report
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(pictures) == 3
    for picture in pictures:
        assert (tmp_path / picture).stat().st_size > 1000


def test_timings_are_set_against_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "WORKLOADS", shapes.workloads("bias_loss", "cpu", tiny=True))
    counted = []
    groups = timings.time_losses(3, lambda: counted.append(1))
    assert len(counted) == len(groups) == len(timings.WORKLOADS)
    for group in groups:
        assert sorted(entry.name for entry in group.entries) == sorted(timings.CONTENDERS)
        assert all(entry.timed and len(entry.samples()) == 3 for entry in group.entries)
    for number, entry in enumerate(groups[0].entries):
        entry.wall = [[0.002, 0.002 + 0.001 * number]]
    first = timings.timing_lines(groups[:1])[-1]
    assert first.startswith(
        f"| {groups[0].shape.replace('/', ', ')} classes, contiguous | 2.000 (1.00) | 2.500 (1.25) |"
    )
