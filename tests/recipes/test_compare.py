"""Comparisons: pairs, statistics, what is claimed and what is not, and the files."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from biasloss_ext.recipes.compare import Comparison, compare
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.statistics import paired_difference, spread
from tests.recipes.tiny import Interrupting, write_cifar

TINY: dict[str, Any] = {"small_input": False, "epochs": 2, "batch_size": 16, "lr": 0.05, "device": "cpu"}


def _compare(folder: Path, display: Display | None = None, **options: Any) -> Comparison:
    data = folder / "data"
    if not data.exists():
        write_cifar(data)
    chosen = {**TINY, "data": "cifar10", "data_dir": str(data), "seeds": (0, 5), **options}
    return compare(folder / "out", display=display or Display(shown=False), **chosen)


def test_goes_on_and_reports_plainly(tmp_path: Path) -> None:
    models = ["skipblocknet_xs", "timm:not_a_package"]
    if _importable("timm"):
        models = ["skipblocknet_xs"]
    with pytest.raises(KeyboardInterrupt):
        _compare(tmp_path, Interrupting(22), models=models)  # in the third of four runs
    found = _compare(tmp_path, models=models)
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        f"skipblocknet_xs-{loss}-seed{seed}" for loss in ("bias", "ce") for seed in (0, 5)
    ]
    bias, plain = (entry for entry in found.entries if entry.outcomes)
    (difference,) = found.differences
    assert difference.first == "skipblocknet_xs with bias"
    assert difference.mean == pytest.approx(np.mean(bias.accuracies) - np.mean(plain.accuracies))
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert [(row["loss"], row["seed"]) for row in rows] == [("bias", "0"), ("bias", "5"), ("ce", "0"), ("ce", "5")]
    assert [float(row["test_accuracy"]) for row in rows] == [*bias.accuracies, *plain.accuracies]
    report = (out / "report.md").read_text()
    assert f"**{difference.verdict}**" in report
    assert f"| skipblocknet_xs | bias | {100 * bias.accuracies[0]:.2f}, {100 * bias.accuracies[1]:.2f} | " in report
    if len(models) > 1:
        assert "| timm:not_a_package | ce | not run: timm is not installed" in report
    for picture in ("accuracy.png", "differences.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def _importable(package: str) -> bool:
    from biasloss_ext.recipes.optional import why_not

    return why_not(package) is None


def test_runs_are_paired_and_models_compared_within_a_loss(tmp_path: Path) -> None:
    models = ["skipblocknet_xs", "skipblocknet_s"]
    found = _compare(tmp_path, models=models, losses=["ce", "focal"], seeds=[1], focal_gamma=0.0, epochs=1)
    assert [(d.first, d.second) for d in found.differences] == [
        ("skipblocknet_xs with ce", "skipblocknet_xs with focal"),
        ("skipblocknet_xs with ce", "skipblocknet_s with ce"),
        ("skipblocknet_s with ce", "skipblocknet_s with focal"),
        ("skipblocknet_xs with focal", "skipblocknet_s with focal"),
    ]
    # A focal loss of exponent 0 is cross-entropy: with the same seed nothing else may differ.
    ce, focal = (entry.outcomes[0].history[-1]["train_loss"] for entry in found.entries[:2])
    assert focal == pytest.approx(ce, rel=1e-4)
    assert all(difference.verdict == "one seed alone: no statement" for difference in found.differences)


def test_the_baseline_is_known(tmp_path: Path) -> None:
    if _importable("torchvision"):
        found = _compare(tmp_path, losses=["ce"], seeds=[0], epochs=1, small_input=True)
        assert [entry.model for entry in found.entries if entry.outcomes] == ["skipblocknet_m", "mobilenet_v3_large"]
    else:
        found = _compare(tmp_path, losses=["ce", "focal"], seeds=[0], epochs=1, batch_size=80)
        reasons = {entry.model: entry.unavailable for entry in found.entries}
        assert reasons["skipblocknet_m"] is None
        assert "torchvision" in str(reasons["mobilenet_v3_large"])


values = st.lists(st.floats(0, 1), min_size=2, max_size=8)


@given(values, values)
def test_interval_is_that_of_the_paired_t_test(first: list[float], second: list[float]) -> None:
    count = min(len(first), len(second))
    a, b = first[:count], second[:count]
    found = paired_difference("a", "b", a, b, resolution=0.0)
    differences = np.subtract(a, b)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-12)
    if differences.std() > 1e-6:
        low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_claims_only_what_the_spread_does_not_cover() -> None:
    def verdict(a: list[float], b: list[float], **options: Any) -> str:
        return paired_difference("a", "b", a, b, **{"resolution": 1 / 360, **options}).verdict

    assert verdict([0.98, 0.99, 0.97], [0.981, 0.98, 0.975]) == "no difference is shown"
    assert verdict([0.99, 0.991, 0.99], [0.95, 0.952, 0.951]) == "a is better than b"
    assert verdict([0.95, 0.952, 0.951], [0.99, 0.991, 0.99]) == "b is better than a"
    # One image in each of three runs happens by chance, though the differences do not spread at all.
    third = 1 / 360
    assert verdict([0.98 + third, 0.97 + third, 0.96 + third], [0.98, 0.97, 0.96]) == "no difference is shown"
    # What one comparison shows, one of many may not: t is 8.7 with 2 degrees of freedom.
    few = ([0.03, 0.04, 0.05], [0.0, 0.0, 0.01])
    assert verdict(*few, comparisons=1) == "a is better than b"
    assert verdict(*few, comparisons=20) == "no difference is shown"
    assert verdict([0.9], [0.1]) == "one seed alone: no statement"


def test_spread() -> None:
    assert spread([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert math.isnan(spread([1.0]))
