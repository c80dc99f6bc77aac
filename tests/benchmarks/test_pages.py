"""The committed pages are what the script makes of the committed runs, and the script shows what the data say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench import families, pages
from biasloss_ext.benchmarks import results
from tests.benchmarks.made_up_runs import TIMES, run


def test_committed_pages_are_up_to_date() -> None:
    for path, text in pages.pages(pages.newest(pages.all_runs())).items():
        assert path.read_text() == text, f"{path.name} is not what `python -m bench.pages` writes"


def test_the_tables_of_accelerate_are_up_to_date() -> None:
    assert families.page() == families.PAGE.read_text(), "run `python -m bench.families --write`"


def test_committed_runs_have_their_plots() -> None:
    for path in pages.RESULTS.glob(f"*/{results.FILE_NAME}"):
        assert list(path.parent.glob("*.png")), f"{path.parent.name} has no plots: python -m bench.pages --plots"


def test_without_a_gpu_run_the_pages_say_so() -> None:
    chosen = pages.newest(pages.all_runs())
    measured = any(device == "cuda" for device, _ in chosen)
    for text in (pages.readme_section(chosen), pages.performance_page(chosen)):
        assert (pages.NO_GPU in text) != measured


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    return pages.RESULTS


def test_the_newest_run_of_each_device_and_op_is_shown(runs: Path) -> None:
    first = run(TIMES)
    for group in first.groups[:2]:
        group.op = "other"
    second = dataclasses.replace(run(TIMES, groups=2), date="2026-02-01T00:00:00+00:00")
    on_gpu = run(TIMES, groups=1)
    on_gpu.device = {"type": "cuda", "name": "Some GPU"}
    for name, found in (("b", first), ("a", second), ("c", on_gpu)):
        found.save(runs / name / results.FILE_NAME)
    chosen = {key: run.folder.name for key, run in pages.newest(pages.all_runs()).items()}
    assert chosen == {("cpu", "op"): "a", ("cpu", "other"): "b", ("cuda", "op"): "c"}
    text = pages.performance_page(pages.newest(pages.all_runs()))
    assert "### op: Some Processor, 2 threads, torch 2.0, 2026-02-01" in text
    assert "### other: Some Processor, 2 threads, torch 2.0, 2026-01-02" in text
    assert "Some GPU" in text
    assert pages.NO_GPU not in text


def test_readme_s_tables(runs: Path) -> None:
    found = run({"ours": 1e-3, pages.AUTHORS: 2e-2, "floor": 5e-4}, noise=1e-9, groups=3)
    loss, network, missing = found.groups
    loss.op, loss.backward, loss.shape, loss.axis = "bias_loss", True, "128x960x7x7/1000", ""
    loss.entries[2].name = pages.FLOOR
    network.op = missing.op = "skipblocknet"
    missing.entries[0].status = "failed"
    missing.backward = True
    found.save(runs / "a" / results.FILE_NAME)
    text = pages.readme_section(pages.newest(pages.all_runs()))
    assert "| 128x960x7x7, 1000 | contiguous | 1 ms | 20 ms (20x) | 500 us (0.5x) |" in text
    assert "| contender | 2 x inference | 3 x training |" in text
    assert "| ours | 1 ms | failed |" in text
    assert pages.NO_GPU in text


def test_only_what_lies_between_the_markers_is_replaced() -> None:
    begin, end = pages.SPEED
    text = f"above {begin} old {end} below"
    replaced = pages.with_section(text, "new")
    assert replaced == f"above {begin}\n\nnew\n\n{end} below"
    assert pages.with_section(replaced, "new") == replaced
    with pytest.raises(SystemExit, match="markers"):
        pages.with_section("no markers", "new")
