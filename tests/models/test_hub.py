"""SkipblockNet in a folder laid out like one of the Hugging Face Hub: saved here, loaded in another process, offline."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from biasloss_ext.models import SkipblockNet, skipblocknet_xs
from tests.models.random_weights import random_state

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys, torch
from biasloss_ext.models import SkipblockNet

model = SkipblockNet.from_pretrained(sys.argv[1], return_features="variance").eval()
variance, scores = model(torch.load(sys.argv[2]))
torch.save((model.config(), scores), sys.argv[3])
"""


def test_saved_here_and_loaded_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model = skipblocknet_xs(num_classes=10, in_chans=1, small_input=True, drop_rate=0.1)
    model.load_state_dict(random_state({key: value.shape for key, value in model.state_dict().items()}))
    model.reset_classifier(7)  # what is saved is the model as it is, not as it was built
    model.eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 7
    assert "library_name: biasloss_ext" in (folder / "README.md").read_text()

    images = torch.randn(2, 1, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    python(LOAD, str(folder), str(tmp_path / "images.pt"), str(tmp_path / "found.pt"))
    config, scores = torch.load(tmp_path / "found.pt", weights_only=True)
    assert config == model.config()
    torch.testing.assert_close(scores, model(images).detach())


def test_copies_keep_their_class() -> None:
    """The mixin makes instances in a way of its own."""
    model = skipblocknet_xs(num_classes=3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is SkipblockNet
        assert other.config() == model.config()
        assert torch.equal(other.classifier[3].weight, model.classifier[3].weight)


WITHOUT = """
import sys
sys.modules["huggingface_hub"] = None
from biasloss_ext.models import SkipblockNet, skipblocknet_xs

for call in (skipblocknet_xs().save_pretrained, SkipblockNet.from_pretrained):
    try:
        call("folder")
    except ImportError as error:
        print(error)
"""


def test_without_the_package_the_error_names_the_extra() -> None:
    said = python(WITHOUT).splitlines()
    assert [line.split(" needs ")[0] for line in said] == ["save_pretrained", "from_pretrained"]
    assert all(line.endswith("pip install 'biasloss_ext[hub]'") for line in said)
