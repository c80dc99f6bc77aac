"""``biasloss export``: a run as an ONNX file that tells how to use it, and scores as the run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biasloss_ext.errors import UserError
from biasloss_ext.recipes import export as exporting
from biasloss_ext.recipes import loop
from biasloss_ext.recipes.predict import predict
from tests.recipes.pictures import write_folder
from tests.recipes.tiny import Fails, build_small, run, write_cifar

ROOT = Path(__file__).parents[2]

onnx = pytest.importorskip("onnx")
for _package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(_package)

# Nothing of ours but the file.
USER = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
mean, deviation = (np.array(facts[name], dtype=np.float32).reshape(-1, 1, 1) for name in ("mean", "deviation"))
pictures = [np.array(Image.open(name).convert("RGB")).transpose(2, 0, 1) for name in sys.argv[1:]]
images = np.stack([(pixels.astype(np.float32) / 255 - mean) / deviation for pixels in pictures])
assert images.shape[2:] == (facts["image_size"], facts["image_size"])
(scores,) = session.run(["scores"], {"images": images})
assert not [name for name in sys.modules if name in ("torch", "biasloss_ext")]
print(json.dumps([[facts["class_names"][row.argmax()], *row.tolist()] for row in scores]))
"""


def biasloss(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "biasloss_ext", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_stranger_classifies_as_the_run_does(tmp_path: Path) -> None:
    """The command and its user are processes of their own; the user has ONNX Runtime alone."""
    trained = tmp_path / "run"
    run(write_cifar(tmp_path / "data"), trained, epochs=1, small_input=True, ema_decay=0.5)
    said = biasloss(tmp_path, "export", str(trained), "--out", "model.onnx")
    assert "model.onnx: largest difference from PyTorch " in said
    names = [f"{number}.png" for number in range(3)]
    for name in names:
        pixels = np.random.default_rng().integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", USER, *names], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = predict(trained, [tmp_path / name for name in names], device="cpu").found
    for (name, *scores), prediction in zip(json.loads(done.stdout), expected, strict=True):
        assert name == prediction.classes[0]
        assert float(torch.tensor(scores).softmax(0).max()) == pytest.approx(prediction.probabilities[0], rel=1e-3)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a small network of linear layers."""
    monkeypatch.setattr(loop, "build_model", build_small)
    monkeypatch.setattr("biasloss_ext.recipes.trained.build_model", build_small)
    monkeypatch.setattr(loop, "write_report", lambda outcome: None)
    recipe = {"loss": "ce", "image_size": 16, "epochs": 1, "batch_size": 4}
    run(write_folder(tmp_path / "data"), tmp_path / "run", data="imagefolder", **recipe)
    return tmp_path / "run"


def test_the_file_says_what_the_checkpoint_knows(trained: Path, tmp_path: Path) -> None:
    done = exporting.export(trained, tmp_path / "model.onnx")
    assert done.difference <= 1e-5 * done.largest
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(done.path).metadata_props}
    preprocessing = facts["mean"], facts["deviation"], facts["image_size"], facts["resize"], facts["interpolation"]
    assert facts["class_names"] == ["daisy", "rose"]
    assert preprocessing == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 16, 18, "bilinear")


def test_other_scores_are_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that mistakes a weight: the file that was there stays."""
    right = exporting._as_onnx

    def wrong(model: torch.nn.Module, shape: tuple[int, ...]) -> object:
        with torch.no_grad():
            model.scores.bias[0] += 1  # type: ignore[index, operator, union-attr]
            proto = right(model, shape)
            model.scores.bias[0] -= 1  # type: ignore[index, operator, union-attr]
        return proto

    monkeypatch.setattr(exporting, "_as_onnx", wrong)
    out = tmp_path / "model.onnx"
    out.write_text("before")
    with pytest.raises(UserError, match=r"differ from PyTorch's by up to 1, scores reach .*: expected at most 0.001"):
        exporting.export(trained / "checkpoint.pt", out)
    assert out.read_text() == "before"
    assert not list(tmp_path.glob(".model*"))


def test_what_cannot_be_exported(fails: Fails, tmp_path: Path) -> None:
    assert "there is no checkpoint nowhere/checkpoint.pt" in fails("export nowhere")
    assert "there is no folder missing to write model.onnx into" in fails("export nowhere --out missing/model.onnx")
