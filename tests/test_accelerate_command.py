"""``biasloss accelerate``, entered as users do: in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "biasloss_ext", "accelerate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_report_and_times(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ("--image-size", "32", "--batch-size", "2", "--rounds", "2", "--out", str(out))
    done = run("skipblocknet_xs", *options)
    assert done.returncode == 0, done.stderr
    counts = "17 of 17 depthwise convolutions, 35 of 35 1x1 convolutions, 53 of 53 normalizations"
    assert f"skipblocknet_xs, on fused kernels: {counts}" in done.stdout
    data = json.loads(out.read_text())
    assert data["layers"]["depthwise convolution"] == {"fused": 17, "total": 17}
    assert data["left"] == []
    forms = {"inference": 4, "training step": 3}
    assert {part: len(times) for part, times in data["milliseconds"].items()} == forms
    for times in data["milliseconds"].values():
        for timing in times.values():
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]


def test_without_times() -> None:
    done = run("skipblocknet_s", "--rounds", "0")
    assert done.returncode == 0, done.stderr
    assert "ms" not in done.stdout.split()


def test_blocks_that_are_measured(tmp_path: Path) -> None:
    """What is faster depends on the machine; every layer that is left must say by how much."""
    out = tmp_path / "report.json"
    options = ("--image-size", "32", "--batch-size", "2", "--rounds", "0", "--measure", "--out", str(out))
    done = run("skipblocknet_xs", *options)
    assert done.returncode == 0, done.stderr
    assert "in inference, on fused kernels: " in done.stdout
    data = json.loads(out.read_text())
    for part, step in ((data, "forward and backward"), (data["inference"], "forward")):
        for left in part["left"]:
            assert re.fullmatch(
                rf"the plain layers are faster: .* ms, fused .* ms, {step} on \(2, .*\)", left["reason"]
            )
        names = {name for left in part["left"] for name in left["layers"]}
        assert len(names) == sum(count["total"] - count["fused"] for count in part["layers"].values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("jax:mobilenet",), "unknown package in 'jax:mobilenet': there are timm:NAME and torchvision:NAME"),
        (("skipblocknet_xs", "--rounds", "-1"), "Invalid value for '--rounds'"),
        (("skipblocknet_xs", "--device", "cuda"), "--device cuda: torch finds no GPU here"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
