"""Trainings that end when they have reached an accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import time_to_accuracy
from biasloss_ext.recipes import loop
from biasloss_ext.recipes.models import build_model
from tests.recipes.tiny import build_small

SMALL: dict[str, Any] = {"train_images": 256, "loss": "ce", "epochs": 3}


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", build_small)


@pytest.mark.parametrize(("target", "epochs", "reached"), [(0.0, 1, True), (1.1, 3, False)])
def test_a_run_ends_at_its_target(monkeypatch: pytest.MonkeyPatch, target: float, epochs: int, reached: bool) -> None:
    monkeypatch.setitem(time_to_accuracy.TARGETS, "digits", target)
    run = time_to_accuracy.measure("digits", "plain PyTorch", 1, **SMALL)
    assert (run["epochs"], run["reached"], run["seed"]) == (epochs, reached, 1)
    assert run["seconds"] > 0 and 0 < run["accuracy"] <= 1


def test_plain_pytorch_has_no_fused_block(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = []
    monkeypatch.setattr(loop, "build_model", lambda recipe, *rest: recipes.append(recipe) or build_small(recipe, *rest))
    monkeypatch.setitem(time_to_accuracy.TARGETS, "digits", 0.0)
    for contender in time_to_accuracy.CONTENDERS:
        time_to_accuracy.measure("digits", contender, 0, **SMALL)
    ours, plain = (
        {module.fused for module in build_model(recipe, 10, 1, 32, []).modules() if hasattr(module, "fused")}
        for recipe in recipes
    )
    assert (ours, plain) == ({"auto"}, {False})


def test_the_table(tmp_path: Path) -> None:
    assert time_to_accuracy.section(tmp_path / "none.json") == []

    def run(contender: str, seed: int, seconds: float, reached: bool = True) -> dict[str, Any]:
        figures = {"seconds": seconds, "epochs": 7, "accuracy": 0.975, "reached": reached}
        return {"data": "digits", "contender": contender, "seed": seed, **figures}

    runs = [run("biasloss_ext", 0, 60.0), run("biasloss_ext", 1, 90.0, reached=False), run("biasloss_ext", 2, 66.0)]
    runs += [run("plain PyTorch", 0, 132.0)]
    (tmp_path / "found.json").write_text(json.dumps({"machine": "a CPU", "torch": "2.0", "runs": runs}))
    text = "\n".join(time_to_accuracy.section(tmp_path / "found.json"))
    assert "| 98% on digits | biasloss_ext | 1.1 | 1.00 | 1 (7), 1.5 (7, 97.5% at the end), 1.1 (7) |" in text
    assert "| 98% on digits | plain PyTorch | 2.2 | 2.00 | 2.2 (7) |" in text
