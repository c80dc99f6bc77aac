"""The memory of a training step by batch size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import memory
from biasloss_ext.benchmarks import skipblocknet

OURS = "biasloss_ext, fused"


def test_memory_grows_with_the_batch_and_ours_is_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CONTENDERS", (OURS, "eager NCHW", "eager channels_last"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = memory.measure((2, 8), (3, 32, 32))["peak_bytes"]
    finally:
        torch.set_num_threads(threads)
    assert list(found) == list(memory.CONTENDERS)
    parameters = 4 * sum(p.numel() for p in skipblocknet.plain(1000).parameters())
    for small, large in found.values():
        assert parameters < small < large  # gradients of all parameters are part of it
    assert all(found[OURS][1] < found[name][1] for name in memory.CONTENDERS[1:])


def test_the_table_and_its_section(tmp_path: Path) -> None:
    assert memory.section(tmp_path / "memory.json") == []
    found = {
        "date": "2026-01-02T00:00:00",
        "versions": {"torch": "2.0"},
        "image": [3, 8, 8],
        "batches": [1, 4],
        "peak_bytes": {"ours": [2_000_000, 5_000_000], "eager": [5_000_000, 20_000_000]},
    }
    (tmp_path / "memory.json").write_text(json.dumps(found))
    text = "\n".join(memory.section(tmp_path / "memory.json"))
    assert "| contender | 1 images | 4 images |" in text
    assert "| eager | 5 MB (2.50) | 20 MB (4.00) |" in text
    assert "images of 3x8x8" in text


@pytest.mark.skipif(not memory.RESULTS.exists(), reason="not measured")
def test_the_committed_figures_are_of_these_contenders() -> None:
    found = json.loads(memory.RESULTS.read_text())
    assert tuple(found["peak_bytes"]) == memory.CONTENDERS
    assert all(len(values) == len(found["batches"]) for values in found["peak_bytes"].values())
