"""Training on fused blocks beside training on the plain ones: the same losses, the same accuracy, the same checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from biasloss_ext.errors import UserError
from biasloss_ext.nn import FusedInvertedResidual
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.recipes.data import load_data
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.losses import build_loss
from biasloss_ext.recipes.models import build_model, scores_of, synchronized
from biasloss_ext.recipes.optional import why_not
from biasloss_ext.recipes.order import Order
from biasloss_ext.recipes.recipe import make_recipe
from biasloss_ext.recipes.schedule import build_optimizer, build_schedule
from tests.recipes.tiny import checkpoint_of


def first_losses(dtype: torch.dtype, fused: str) -> list[float]:
    """Of the first three steps on digits."""
    recipe = make_recipe("digits", fused=fused)
    data = load_data(recipe, torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(recipe, data.classes, data.channels, data.image_size).to(dtype)
    loss_fn, optimizer = build_loss(recipe), build_optimizer(recipe, model)
    order = Order(data.train_images, recipe.batch_size)
    schedule = build_schedule(recipe, optimizer, order.steps)
    losses = []
    for images, target in data.train_batches(0, order.batches(0)[:3]):
        loss, _ = loss_fn(model(images.to(dtype)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_first_losses_are_those_of_float64() -> None:
    """The first to a few roundings. AdamW begins with steps of one length, whatever the gradient: where its sign is a matter of
    rounding, the whole step is, which puts the third loss of the plain layers off by up to 5e-4."""
    exact, found = first_losses(torch.float64, "off"), first_losses(torch.float32, "on")
    for step, (value, expected, bound) in enumerate(zip(found, exact, (2e-6, 1e-4, 5e-4), strict=True)):
        assert value == pytest.approx(expected, rel=bound), f"step {step + 1}"


@pytest.mark.parametrize(("choice", "expected"), [("off", False), ("on", True), ("auto", "auto")])
def test_choice_reaches_our_own_blocks(choice: str, expected: bool | str) -> None:
    model = build_model(make_recipe("digits", fused=choice), 10, 1, 32)
    assert {block.fused for block in model.modules() if isinstance(block, FusedInvertedResidual)} == {expected}


@pytest.mark.slow
@pytest.mark.thorough
def test_same_accuracy_and_checkpoints_of_each_other(tmp_path: Path) -> None:
    runs = {}
    for fused in ("on", "off"):
        recipe = make_recipe("digits", epochs=4, fused=fused)
        runs[fused] = train(recipe, tmp_path / fused, device="cpu", display=Display(shown=False))
    assert min(run.accuracy for run in runs.values()) > 0.85
    assert abs(runs["on"].accuracy - runs["off"].accuracy) < 0.04
    data = load_data(runs["on"].recipe, torch.device("cpu"))
    images, _ = next(iter(data.test_batches([torch.arange(128)])))
    for source, other in (("on", "off"), ("off", "on")):
        weights = str(tmp_path / source / "checkpoint.pt")
        scores = []
        for fused in (source, other):
            recipe = make_recipe("digits", fused=fused, weights=weights)
            model = build_model(recipe, data.classes, data.channels, data.image_size).eval()
            assert list(model.state_dict()) == list(checkpoint_of(tmp_path / source)["model"])
            with torch.no_grad():
                scores.append(scores_of(model(images)))
        torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-4 * float(scores[0].abs().max()))


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_large", "timm:mobilenetv3_large_100"])
def test_models_of_other_packages(name: str) -> None:
    if reason := why_not(name.partition(":")[0]):
        pytest.skip(reason)

    def built(fused: str) -> nn.Module:
        torch.manual_seed(0)
        return build_model(make_recipe("digits", model=name, fused=fused), 10, 3, 32).eval()

    plain, fused = built("off"), built("auto")
    counts = [
        sum(isinstance(module, FusedBlock) for module in model.modules()) for model in (plain, fused, built("on"))
    ]
    assert counts == [0, 15, 15]
    assert list(fused.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(fused(images), plain(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_synchronized_normalizations_of_timm_keep_their_activations() -> None:
    if reason := why_not("timm"):
        pytest.skip(reason)
    recipe = make_recipe("digits", model="timm:mobilenetv3_large_100")
    model = build_model(recipe, 10, 3, 32)
    held = {name for name, module in model.named_modules() if isinstance(getattr(module, "act", None), nn.Module)}
    converted = dict(synchronized(model, recipe).named_modules())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.values())
    for name in held & converted.keys():
        assert type(converted[name]) is not nn.SyncBatchNorm, name


def test_fused_on_names_what_is_missing() -> None:
    if reason := why_not("torchvision"):
        pytest.skip(reason)
    with pytest.raises(UserError, match="--fused on: torchvision:resnet18 has no blocks with fused kernels"):
        build_model(make_recipe("digits", model="torchvision:resnet18", fused="on"), 10, 3, 32)
