"""The model card and the weights that a run leaves for others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from biasloss_ext.models import SkipblockNet
from biasloss_ext.recipes.trained import load_trained
from biasloss_ext.recipes.weights import load_weights
from tests.recipes.tiny import run, write_cifar


def metadata(card: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_of_ours_is_a_folder_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    folder = tmp_path / "run"
    outcome = run(write_cifar(tmp_path / "data"), folder, epochs=1, small_input=True, ema_decay=0.5)
    trained, images = load_trained(folder), torch.randn(3, 3, 32, 32)
    published = SkipblockNet.from_pretrained(folder).eval()
    torch.testing.assert_close(published(images), trained(images))
    weights = SkipblockNet(**published.config())
    load_weights(weights, folder / "model.safetensors", "the published model")
    torch.testing.assert_close(weights.eval()(images), trained(images))

    card = (folder / "README.md").read_text()
    (entry,) = metadata(card)["model-index"]
    assert entry["results"][0]["metrics"][0]["value"] == pytest.approx(outcome.accuracy, abs=1e-6)
    assert f"**{outcome.accuracy:.2%}** on 16 test images, with the moving average of the weights" in card
    assert str(tmp_path) not in card  # it goes to other machines
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(folder / "image.png")
    monkeypatch.chdir(folder)
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


def test_of_a_tapped_model_the_model_is_published(tmp_path: Path) -> None:
    run(write_cifar(tmp_path / "data"), tmp_path / "run", epochs=1, small_input=True, features_from="conv")
    assert "SkipblockNet.from_pretrained" in (tmp_path / "run" / "README.md").read_text()
    model = SkipblockNet(**json.loads((tmp_path / "run" / "config.json").read_text()))
    load_weights(model, tmp_path / "run" / "model.safetensors", "the published model")
