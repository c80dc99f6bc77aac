"""The README's chart says what the runs say."""

from __future__ import annotations

from pathlib import Path

from bench import readme_chart
from biasloss_ext.benchmarks.results import Group
from tests.benchmarks.made_up_runs import run

TIMES = {
    "biasloss_ext, fused": 2e-3,
    "biasloss_ext, optimized": 1e-3,
    "eager NCHW": 6e-3,
    "ONNX Runtime": 5e-4,
    "eager + authors' loss": 8e-3,
}


def groups() -> list[Group]:
    """Inference of one image, of many, and training of many."""
    found = run(TIMES, noise=0.0, groups=3).groups
    for group, (batch, backward) in zip(found, ((1, False), (16, False), (16, True)), strict=True):
        group.op, group.batch, group.backward = "skipblocknet", batch, backward
    kept = {entry.name: entry for entry in found[2].entries}
    kept["biasloss_ext, fused"].peak_bytes = 50_000_000
    kept["eager NCHW"].peak_bytes = 75_000_000
    kept["ONNX Runtime"].status = "unavailable"
    found[2].entries = [kept[name] for name in ("biasloss_ext, fused", "eager NCHW", "ONNX Runtime")]
    return found


def test_bars_and_claims(tmp_path: Path) -> None:
    listed = {title: (unit, list(bars)) for title, unit, bars in readme_chart.panels(groups())}
    assert listed == {
        "training step, 16 images": ("ms", ["biasloss_ext", "PyTorch"]),
        "inference, 1 image": ("ms", ["ONNX Runtime", "biasloss_ext", "PyTorch"]),
        "training memory, 16 images": ("MB", ["biasloss_ext", "PyTorch"]),
    }
    assert readme_chart.claims(groups()) == [
        "- Training step, 16 images: **2 ms**. Relative to this, PyTorch: 3.00x.",
        "- Inference, 1 image: **1 ms**. Relative to this, ONNX Runtime: 0.50x; PyTorch: 6.00x.",
        "- Training memory, 16 images: **50 MB**. Relative to this, PyTorch: 1.50x.",
    ]
    drawn = tmp_path / "speed.svg"
    readme_chart.draw(groups(), drawn)
    text = drawn.read_text()
    for words in ("training step, 16 images, ms", "ONNX Runtime", "PyTorch", ">50<", ">0.5<"):
        assert words in text


def test_without_the_network_there_is_nothing_to_claim() -> None:
    assert readme_chart.claims([]) == []
