"""The command biasloss diversity: runs and models by name, side by side."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from biasloss_ext.diversity import layer_variances
from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data import load_data
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.diversity import measure_diversity
from biasloss_ext.recipes.trained import load_trained
from tests.recipes.tiny import run, tiny_recipe, write_cifar


def test_runs_beside_models_by_name(tmp_path: Path) -> None:
    data, quiet = write_cifar(tmp_path / "data"), Display(shown=False)
    for loss in ("bias", "ce"):
        run(data, tmp_path / loss, loss=loss, epochs=1)
    torch.save(load_trained(tmp_path / "ce").state_dict(), tmp_path / "weights.pt")
    by_name = f"skipblocknet_xs@{tmp_path / 'weights.pt'}"
    sources = [str(tmp_path / "bias"), str(tmp_path / "ce"), by_name, "skipblocknet_s"]
    out = tmp_path / "out"
    rows = measure_diversity(sources, out, small_input=False, batch_size=5, display=quiet)
    of_model = {name: [row for row in rows if row.model == name] for name in ("bias", "ce", by_name, "skipblocknet_s")}
    assert sum(map(len, of_model.values())) == len(rows)
    assert all(row.samples == 16 for row in rows)
    assert [row.mean for row in of_model["ce"]] == [row.mean for row in of_model[by_name]]
    assert [row.mean for row in of_model["ce"]] != [row.mean for row in of_model["bias"]]

    images = load_data(tiny_recipe(data), torch.device("cpu")).test_batches([torch.arange(16)])
    variances = layer_variances(load_trained(tmp_path / "ce"), images, ["conv"])["conv"]
    assert of_model["ce"][-1].layer == "conv"
    assert of_model["ce"][-1].mean == pytest.approx(variances.double().mean().item(), rel=1e-5)

    assert len(list(csv.DictReader((out / "diversity.csv").open()))) == len(rows)
    assert f"| conv | {by_name} | " in (out / "report.md").read_text()
    assert (out / "diversity.png").read_bytes().startswith(b"\x89PNG")

    chosen = measure_diversity(sources[:1], out, layers=["blocks.1", "conv"], threshold=1e9, display=quiet)
    assert [(row.layer, row.below) for row in chosen] == [("blocks.1", 1.0), ("conv", 1.0)]

    run(write_cifar(tmp_path / "hundred", "cifar100", 80), tmp_path / "other", epochs=1, batch_size=80, data="cifar100")
    with pytest.raises(
        UserError, match=r"different images \(cifar10 at 32 x 32, cifar100 at 32 x 32\): say with --data"
    ):
        measure_diversity([str(tmp_path / "bias"), str(tmp_path / "other")], tmp_path / "never", display=quiet)
    assert not (tmp_path / "never").exists()
