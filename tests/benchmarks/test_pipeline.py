"""The table of images per second that reach a training step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import pipeline
from biasloss_ext.recipes.optional import why_not


def test_the_table_and_its_section(tmp_path: Path) -> None:
    assert pipeline.section(tmp_path / "pipeline.json") == []
    rates = {pipeline.PEER: [90.0, 100.0, 500.0], "packed, raw": [330.0, 350.0, 360.0]}
    found = {
        "date": "2026-01-02T00:00:00",
        "machine": "a CPU",
        "versions": {"torch": "2.0", "torchvision": "0.1", "pillow": "9"},
        "images_per_second": {"500 x 375": rates},
    }
    (tmp_path / "pipeline.json").write_text(json.dumps(found))
    text = "\n".join(pipeline.section(tmp_path / "pipeline.json"))
    assert "| packed, raw | 350 (3.5) |" in text
    assert "a CPU" in text


@pytest.mark.skipif(why_not("torchvision") is not None, reason="no torchvision")
def test_every_contender_is_measured() -> None:
    found = pipeline.measure((64, 48), images=16, rounds=1)
    assert list(found) == [pipeline.PEER, "imagefolder", "packed, jpeg", "packed, raw"]
    assert all(len(rates) == 1 and rates[0] > 0 for rates in found.values())


@pytest.mark.skipif(not pipeline.RESULTS.exists(), reason="not measured")
def test_the_committed_figures_are_of_these_sizes() -> None:
    found = json.loads(pipeline.RESULTS.read_text())["images_per_second"]
    assert list(found) == [f"{width} x {height}" for width, height in pipeline.IMAGES]
    assert len({len(rates) for of_size in found.values() for rates in of_size.values()}) == 1
