"""The page of the study: written from the files of the runs, and saying no more than they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.study import plan, plots, records, report, runner


def record(run: plan.Run, accuracy: float) -> dict[str, Any]:
    last = {"epoch": 12, "train_loss": 0.5, "test_loss": 0.7, "test_accuracy": accuracy}
    relations = {"loss": -0.6, "margin": 0.6, "class_share": 0.5, "misclassified": 0.25, "class_means": [2.0, 0.5]}
    layer = {"layer": "conv", "mean": 1.0, "q05": 0.1, "q25": 0.5, "median": 0.9, "q75": 1.5, "q95": 3.0, "below": 0.2}
    return {
        "run": {},
        "accuracy": accuracy,
        "test_images": 10_000,
        "recipe": runner.portable(run.recipe()),
        "history": [{"epoch": 6, "train_loss": 0.9, "test_loss": 0.9, "test_accuracy": accuracy / 2}, last],
        "analysis": {"test": relations, "train": {**relations, "wrong_label": 0.47}, "layers": [layer]},
        "environment": {"device": {"name": "Some Processor", "threads": 1}, "torch": "2.0"},
    }


def write(results: Path, letter: str, setting: str, accuracies: dict[str, list[float]]) -> None:
    for run in plan.runs([letter], [setting]):
        values = accuracies.get(run.variant, [])
        if run.seed < len(values):
            path = runner.result_path(run, results)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(runner.as_text(record(run, values[run.seed])))


def written(tmp_path: Path) -> str:
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir(exist_ok=True)
    assert report.main(results=tmp_path / "results", docs=page.parent) == 0
    assert report.main(check=True, results=tmp_path / "results", docs=page.parent) == 0
    return page.read_text()


def test_the_committed_page_is_up_to_date() -> None:
    assert report.main(check=True) == 0, "run `python -m bench.study report`"


def test_without_runs_it_says_so(tmp_path: Path) -> None:
    before = tmp_path / "docs" / "images" / plots.CURVES
    before.parent.mkdir(parents=True)
    before.touch()
    text = written(tmp_path)
    assert not before.exists()
    planned = sum(1 for _ in plan.runs())
    assert f"0 of {planned} planned runs are finished." in text
    assert text.count("Not run yet.") == sum(len(part.settings) for part in plan.PARTS)
    assert "![" not in text


def test_it_tells_what_is_shown_from_what_is_not(tmp_path: Path) -> None:
    seeds = [0.80, 0.81, 0.79, 0.80, 0.81]
    clear = [value + 0.05 + 0.001 * number for number, value in enumerate(seeds)]
    hidden = [value + (-1) ** number * 0.02 for number, value in enumerate(seeds)]
    write(tmp_path / "results", "b", "2000", {"bias": clear, "ce": seeds, "focal": hidden})
    write(tmp_path / "results", "b", "10000", {"bias": hidden, "ce": seeds})
    text = written(tmp_path)
    assert "- (b) 2,000 images: **bias is better than ce** by 5.20 points (+4.89 to +5.51), 5 seeds." in text
    assert "| bias minus ce | 5 | +5.20 |" in text
    assert "no difference is shown in these settings:\n\n- (b) 10,000 images: +0.40 points" in text
    assert "| ce | 5 | 80.20 | 0.84 | 0.700 | 0.500 |  |" in text
    assert "| (b) 2,000 images | bias | 5 | -0.60 | 0.60 | 0.50 | 0.25 | 0.47 |" in text
    assert "| (b) 10,000 images | ce | 2.00 | 0.50 |" in text
    assert "- 25 on Some Processor, 1 thread, torch 2.0" in text
    for name in ("differences", "curves", "layers"):
        assert f"](images/study-{name}.svg)" in text
        assert "<svg" in (tmp_path / "docs" / "images" / f"study-{name}.svg").read_text()
    drawn = {path: path.read_bytes() for path in (tmp_path / "docs" / "images").iterdir()}
    assert written(tmp_path) == text
    assert all(path.read_bytes() == content for path, content in drawn.items())


def test_seeds_are_paired_and_one_alone_shows_nothing(tmp_path: Path) -> None:
    write(
        tmp_path / "results", "d", "2000-noise20-local", {"alpha 0.3, beta 0.3": [0.8, 0.9], "alpha 1, beta 0": [0.7]}
    )
    text = written(tmp_path)
    assert "| alpha 1, beta 0 minus alpha 0.3, beta 0.3 | 1 | -10.00 |  | one seed alone: no statement |" in text
    assert "3 of 27 planned runs are finished." in text
    assert "images/study-grid.svg" in text


def test_the_page_on_training_has_the_whole_run(tmp_path: Path) -> None:
    training = tmp_path / "docs" / "training.md"
    training.parent.mkdir()
    training.write_text(f"above\n\n{report.MARKERS[0]}\n\nold\n\n{report.MARKERS[1]}\n\nbelow\n")
    write(tmp_path / "results", "a", "60000", {"ce": [0.93]})
    written(tmp_path)
    assert "\nold\n" in training.read_text()
    write(tmp_path / "results", "a", plan.WHOLE_RUN, {"bias": [0.9251]})
    written(tmp_path)
    text = training.read_text()
    assert "\nold\n" not in text
    assert (
        "reached **92.51%** of the 10,000 test images\nafter 10 epochs, and 92% first after epoch 12: one run" in text
    )
    assert "biasloss train --data fashion_mnist --data-dir data --epochs 10 --out" in text
    assert text.startswith("above") and text.endswith("below\n")
    training.write_text(text.replace("92.51", "93.51"))
    assert report.main(check=True, results=tmp_path / "results", docs=training.parent) == 1


def test_a_stale_page_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    write(tmp_path / "results", "b", "2000", {"bias": [0.8]})
    assert report.main(check=True, results=tmp_path / "results", docs=tmp_path / "docs") == 1
    assert "not up to date: study.md; run" in capsys.readouterr().err


def test_pairs_have_the_seeds_of_both() -> None:
    setting = plan.PARTS[1].settings[0]
    listed = {
        "bias": {0: {"accuracy": 0.5}, 2: {"accuracy": 0.7}},
        "ce": {2: {"accuracy": 0.6}, 1: {"accuracy": 0.1}},
    }
    assert records.Found(plan.PARTS[1], setting, listed).pairs("bias", "ce") == [(0.7, 0.6)]
