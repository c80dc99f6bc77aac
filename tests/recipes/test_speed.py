"""``biasloss data speed``: what it measures, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from biasloss_ext.cli import main
from biasloss_ext.recipes import loop, speed
from biasloss_ext.recipes.data import Data
from biasloss_ext.recipes.order import Order
from biasloss_ext.recipes.speed import Speed, measure_speed
from tests.recipes.pictures import write_folder
from tests.recipes.tiny import Fails, tiny_recipe, use_linear_model, write_cifar

FOLDER = "--data imagefolder --data-dir data --model skipblocknet_xs --image-size 32 --small-input --batch-size 4"


def test_it_measures_images_per_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("data"))
    files = sorted(Path().rglob("*"))
    line = ["biasloss", "data", "speed", *FOLDER.split(), "--seconds", "0.1", "--workers", "0"]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 0
    said = capsys.readouterr().out
    assert re.search(r"data pipeline alone: \S+ images per second \(imagefolder, 0 workers\)", said)
    assert re.search(r"training step alone: \S+ images per second \(skipblocknet_xs, batches of 4\)", said)
    assert sorted(Path().rglob("*")) == files


def test_images_are_counted_over_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a batch takes 10 ms and a step 40 ms more."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    use_linear_model(monkeypatch)
    recipe = tiny_recipe(write_cifar(tmp_path), batch_size=16, accumulate=2, loss="ce")
    batches, step = speed.endless_batches, loop.Run.take_step

    def slow_batches(data: Data, order: Order) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(data, order):
            now[0] += 0.01
            yield batch

    def slow_step(run: loop.Run, given: Iterator[tuple[Tensor, Tensor]]) -> None:
        now[0] += 0.04
        step(run, given)

    monkeypatch.setattr(speed, "endless_batches", slow_batches)
    monkeypatch.setattr(loop.Run, "take_step", slow_step)
    found = measure_speed(recipe, device="cpu", seconds=1.0)
    assert found.pipeline == pytest.approx(8 / 0.01)
    assert found.step == pytest.approx(16 / 0.04)


def test_the_verdict_names_the_slower() -> None:
    assert "--workers" in Speed(pipeline=10, step=20).verdict
    assert "not the data pipeline" in Speed(pipeline=20, step=10).verdict


def test_what_cannot_be_measured_is_refused(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--seconds must be above 0, got 0" in fails("data speed --seconds 0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in fails("data speed")
