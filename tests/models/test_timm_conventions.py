"""What users of timm expect of a model, and the models in timm's own registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from biasloss_ext import models

TIMM_STUB = """
registered = {}

def register_model(entrypoint):
    registered[entrypoint.__name__] = entrypoint
    return entrypoint

def generate_default_cfgs(configurations):
    return configurations

def build_model_with_cfg(builder, name, pretrained, feature_cfg, **options):
    return builder(**options)
"""


def test_registry() -> None:
    assert models.list_models() == ["skipblocknet_xs", "skipblocknet_s", "skipblocknet_m", "skipblocknet_l"]
    assert models.create_model("skipblocknet_s", num_classes=7).num_classes == 7
    with pytest.raises(ValueError, match="unknown model 'resnet18'; the models are skipblocknet_xs, skipblocknet_s, "):
        models.create_model("resnet18")


@pytest.mark.parametrize("fused", [False, "auto"])
def test_features_head_and_logits(fused: bool | str) -> None:
    model = models.skipblocknet_m(num_classes=5, fused=fused).eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    hidden = model.forward_head(features, pre_logits=True)
    assert (model.num_features, model.head_hidden_size) == (960, 1280)
    assert features.shape == (2, model.num_features, 2, 2)
    assert hidden.shape == (2, model.head_hidden_size)
    scores = model.forward_head(features)
    assert torch.equal(model.get_classifier()(hidden), scores)
    # Fused, the pool adds the map up in another order than when the map is handed out.
    tolerance = 1e-5 * scores.abs().max().item() if fused else 0.0
    torch.testing.assert_close(model(images), scores, rtol=0, atol=tolerance)


def test_reset_classifier() -> None:
    torch.manual_seed(0)
    model = models.skipblocknet_xs(num_classes=5).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    hidden = model.forward_head(model.forward_features(images), pre_logits=True)

    model.reset_classifier(7)
    assert model(images).shape == (1, 7)
    assert model(images).dtype == torch.float64
    assert model.num_classes == 7
    assert model.get_classifier().weight.std().item() == pytest.approx(0.01, rel=0.05)

    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(images), hidden)

    with pytest.raises(ValueError, match="global_pool must be 'avg'"):
        model.reset_classifier(7, "max")


@pytest.mark.parametrize("name", models.list_models())
def test_feature_info_names_modules_with_those_shapes(name: str) -> None:
    model = models.create_model(name).eval()
    shapes = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda _module, _inputs, output, key=info["module"]: shapes.update({key: tuple(output.shape)})
        )
    model(torch.randn(1, 3, 64, 96))
    assert shapes == {
        info["module"]: (1, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
        for info in model.feature_info
    }
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]


def test_default_cfg_names_the_first_and_the_last_layer() -> None:
    model = models.skipblocknet_xs(num_classes=5, in_chans=1, small_input=True)
    cfg = model.default_cfg
    assert model.get_submodule(cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert (cfg["num_classes"], cfg["input_size"]) == (5, (1, 32, 32))
    features = model.eval().forward_features(torch.zeros(1, *cfg["input_size"]))
    assert features.shape[2:] == cfg["pool_size"] == (2, 2)
    assert models.skipblocknet_xs().default_cfg["pool_size"] == (7, 7)


def run_with_timm(timm_models: str, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script where `timm` is a package whose `timm.models` is the given text."""
    (folder / "timm").mkdir()
    (folder / "timm" / "__init__.py").write_text("from . import models\n")
    (folder / "timm" / "models.py").write_text(timm_models)
    setup = f"import sys; sys.path[:0] = {[str(folder), *sys.path]}\n"
    return subprocess.run([sys.executable, "-c", setup + script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("imports", ["import timm, biasloss_ext.models", "import biasloss_ext.models, timm"])
def test_timm_knows_the_models_whichever_is_imported_first(imports: str, tmp_path: Path) -> None:
    script = f"{imports}\nprint(*timm.models.registered)\n"
    script += "print(timm.models.registered['skipblocknet_xs'](num_classes=3).num_classes)"
    result = run_with_timm(TIMM_STUB, script, tmp_path)
    assert result.stdout.split() == [*models.list_models(), "3"], result.stderr


def test_timm_is_not_imported_by_us(tmp_path: Path) -> None:
    result = run_with_timm("1 / 0", "import biasloss_ext.models; print('timm' in sys.modules)", tmp_path)
    assert result.stdout.strip() == "False", result.stderr


def test_an_unknown_timm_goes_on_working(tmp_path: Path) -> None:
    result = run_with_timm("answer = 42", "import biasloss_ext.models, timm; print(timm.models.answer)", tmp_path)
    assert result.stdout.strip() == "42", result.stderr
    assert "could not be registered with timm" in result.stderr


def test_in_timm_itself() -> None:
    try:
        import timm
    except Exception as error:  # timm fails in many ways beside a torch that its torchvision was not built for
        pytest.skip(f"timm cannot be imported: {error!r}")
    assert timm.list_models("skipblocknet_*") == sorted(models.list_models())
    model = timm.create_model("skipblocknet_xs", num_classes=4, in_chans=1, return_features="features").eval()
    features, scores = model(torch.randn(1, 1, 64, 64))
    assert features.shape == (1, 480, 2, 2)
    assert scores.shape == (1, 4)
    assert timm.data.resolve_data_config(model=model)["crop_pct"] == 0.875

    pyramid = timm.create_model("skipblocknet_xs", features_only=True, out_indices=(1, 4)).eval()
    assert [tuple(level.shape) for level in pyramid(torch.randn(1, 3, 64, 64))] == [(1, 16, 16, 16), (1, 480, 2, 2)]
    assert pyramid.feature_info.reduction() == [4, 32]
