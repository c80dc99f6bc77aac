"""Runs of the study: what is trained, what is left after an interruption, and what the files say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.study import plan, runner
from bench.study.__main__ import main
from bench.study.analysis import Samples, relations
from biasloss_ext.errors import UserError
from tests.recipes.idx_files import write_idx
from tests.recipes.tiny import Interrupting

ROOT = Path(__file__).resolve().parents[2]
TINY = {"train_images": 40, "label_noise": 0.2, "epochs": 2, "batch_size": 16, "small_input": False, "test_every": 2}
SETTING = dataclasses.replace(plan.PARTS[1].settings[0], options=TINY, seeds=(0,))
PART = dataclasses.replace(plan.PARTS[1], settings=(SETTING,))
RUNS = [plan.Run(PART, SETTING, variant, 0) for variant in ("bias", "ce", "bias, mean weight 1")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("fashion")
    write_idx(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all of `RUNS`."""
    folder = tmp_path_factory.mktemp("finished")
    assert runner.run_all(RUNS, runner.Folders(data, folder / "work", folder / "results"), "cpu") == 3
    assert not list((folder / "work").rglob("*.pt"))
    return folder / "results"


def without_environment(path: Path) -> dict[str, object]:
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "environment"}


def test_a_file_has_what_the_report_needs(finished: Path) -> None:
    bias, plain, divided = (json.loads(runner.result_path(run, finished).read_text()) for run in RUNS)
    assert bias["run"] == {"part": "b", "setting": "2000-noise20", "variant": "bias", "seed": 0}
    assert bias["test_images"] == 16
    assert bias["accuracy"] == bias["history"][-1]["test_accuracy"]
    assert "test_accuracy" not in bias["history"][0]
    assert 0.6 < bias["history"][-1]["weight_mean"] < 1.1
    assert "data_dir" not in bias["recipe"]
    assert plain["recipe"] == {**bias["recipe"], "loss": "ce"}
    assert divided["history"][-1]["weight_mean"] == pytest.approx(1)
    for record in (bias, plain, divided):
        assert record["analysis"]["test"]["images"] == 16
        assert record["analysis"]["train"]["images"] == 40
        assert 0 <= record["analysis"]["train"]["wrong_label"] <= 1
        assert {row["layer"] for row in record["analysis"]["layers"]} >= {"first_layer", "conv"}


def test_finished_runs_stay(finished: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "train", None)
    assert runner.run_all(RUNS, runner.Folders(data, tmp_path, finished)) == 0


def test_an_interrupted_run_ends_with_the_same_results(
    finished: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = runner.Folders(data, tmp_path / "work", tmp_path / "results")
    monkeypatch.setattr(runner, "CHECKPOINT_STEPS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "Display", lambda: Interrupting(4))
        with pytest.raises(KeyboardInterrupt):
            runner.run_all(RUNS[:1], folders, "cpu")
    assert len(list(folders.work.rglob("checkpoint.pt"))) == 1
    assert runner.run_all(RUNS[:1], folders, "cpu") == 1
    paths = [runner.result_path(RUNS[0], results) for results in (finished, folders.results)]
    assert without_environment(paths[0]) == without_environment(paths[1])


def test_a_run_is_one_process_s(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "train", None)
    folders = runner.Folders(data, tmp_path / "work", tmp_path / "results")
    with runner.claimed(folders.work / RUNS[0].name) as mine:
        assert mine
        assert runner.run_all(RUNS[:1], folders) == 0
        assert (folders.work / RUNS[0].name).exists()


def test_results_of_another_recipe_are_refused(finished: Path, data: str, tmp_path: Path) -> None:
    other = dataclasses.replace(SETTING, options={**TINY, "lr": 0.5})
    with pytest.raises(UserError, match=r"results of another recipe \(lr differ\)"):
        runner.run_all([plan.Run(PART, other, "bias", 0)], runner.Folders(data, tmp_path, finished))


def test_every_planned_run_has_a_recipe_and_a_name_of_its_own() -> None:
    planned = list(plan.runs())
    assert len({run.name for run in planned}) == len(planned)
    for part in plan.PARTS:
        for setting in part.settings:
            recipes = [plan.Run(part, setting, variant, 0).recipe() for variant in setting.variants]
            assert len(set(recipes)) == len(recipes)
            assert {name for pair in setting.pairs for name in pair} <= set(setting.variants)


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "--part", "b", "--setting", "2000", "--seed", "1", "--results", str(tmp_path)])
    listed = capsys.readouterr().out.splitlines()
    assert (len(listed), listed[0]) == (5, "missing b/2000/bias-seed1")
    assert listed[-1] == "4 of 4 runs are missing: 0.096 million images to train on"
    command = [sys.executable, "-m", "bench.study", "run", "--part", "z", "--data-dir", str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (refused.returncode, refused.stderr) == (1, "error: unknown part 'z': there are a, b, s, c, d\n")


def test_relations_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    variance = torch.rand(60, generator=generator, dtype=torch.float64)
    margin = torch.randn(60, generator=generator, dtype=torch.float64)
    label = torch.arange(60) % 3
    wrong = torch.arange(60) % 5 == 0
    found = relations(Samples(variance, 2 * variance**3, margin, label), wrong)
    assert found["loss"] == pytest.approx(1)
    ranks = torch.stack((variance.argsort().argsort(), margin.argsort().argsort())).double()
    assert found["margin"] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    means = torch.stack([variance[label == number].mean() for number in range(3)])
    assert found["class_share"] == pytest.approx(float(means.var(correction=0) / variance.var(correction=0)))
    assert found["class_means"] == pytest.approx((means / variance.mean()).tolist())
    for name, chosen in (("misclassified", margin < 0), ("wrong_label", wrong)):
        higher = variance[chosen][:, None] > variance[~chosen][None]
        assert found[name] == pytest.approx(float(higher.double().mean()))


def test_relations_without_an_answer_have_none() -> None:
    samples = Samples(torch.ones(4).double(), torch.rand(4).double(), torch.ones(4).double(), torch.arange(4))
    found = relations(samples)
    assert (found["loss"], found["misclassified"], found["class_share"]) == (None, None, 0)
    assert "wrong_label" not in found
