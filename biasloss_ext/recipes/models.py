"""The models that a recipe can name, with features for Bias Loss where the loss needs them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.acceleration import accelerate
from biasloss_ext.errors import UserError
from biasloss_ext.features import FeatureTap
from biasloss_ext.models import create_model, list_models
from biasloss_ext.recipes.optional import optional, torchvision, why_not
from biasloss_ext.recipes.recipe import Recipe
from biasloss_ext.recipes.weights import load_weights

ALIASES = {"mobilenet_v3_large": "torchvision:mobilenet_v3_large"}
# Where families of torchvision keep everything before the pooling.
_FEATURE_MODULES = ("features", "layer4", "conv5", "trunk_output", "layers")


def unavailable(name: str) -> str | None:
    """Why a model cannot be had here, because its package cannot be imported; None when it can."""
    source, colon, _ = ALIASES.get(name, name).partition(":")
    return why_not(source) if colon and source in ("timm", "torchvision") else None


def build_model(
    recipe: Recipe, classes: int, channels: int, image_size: int, notes: list[str] | None = None
) -> nn.Module:
    """The model of a recipe, on the CPU, with initial weights from torch's global random state or ``recipe.weights``.

    Args:
        notes: takes a sentence where the classifier of ``recipe.weights`` has another number of classes and so begins
            anew; None requires all weights to be loaded.

    Returns:
        A module that takes images (N, channels, image_size, image_size). For Bias Loss it returns a pair: the features
        (N, *) or their variance (N,), then the scores; for the other losses the scores (N, classes) alone. Both
        have the same state_dict.

    Raises:
        UserError: unknown model or module, weights of another model, or images that the model does not take.
    """
    model = _tapped(recipe, _bare(recipe, classes, channels))
    if recipe.weights is not None:
        load_weights(model, Path(recipe.weights), f"{recipe.model} with {classes} classes", notes)
    _try_out(model, recipe, classes, channels, image_size)
    return model


def scores_of(outputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The scores in what such a model returns."""
    return outputs if isinstance(outputs, Tensor) else outputs[1]


def _bare(recipe: Recipe, classes: int, channels: int) -> nn.Module:
    """The model as its package builds it, returning scores."""
    source, colon, name = ALIASES.get(recipe.model, recipe.model).partition(":")
    if not colon and source in list_models():
        fused = {"auto": "auto", "on": True, "off": False}[recipe.fused]
        options = {"num_classes": classes, "in_chans": channels, "small_input": recipe.small_input}
        return create_model(source, **options, fused=fused)
    if not colon:
        names = [*list_models(), *ALIASES, "timm:NAME", "torchvision:NAME"]
        raise UserError(f"unknown model {recipe.model!r}: there are {', '.join(names)}")
    model = _from_package(recipe.model, source, name, classes, in_chans=channels)
    if recipe.small_input:
        _adapt_to_small_input(model)
    if recipe.fused != "off":
        _accelerate(model, recipe)
    return model


def _from_package(asked: str, source: str, name: str, classes: int, **of_timm: Any) -> nn.Module:
    """A model of timm or torchvision with initial weights."""
    if source == "timm":
        timm = optional("timm", asked)
        return _built(asked, name, timm.list_models(), timm.create_model, num_classes=classes, **of_timm)
    if source == "torchvision":
        models = torchvision(asked).models
        known = models.list_models(module=models)
        return _built(asked, name, known, models.get_model, weights=None, num_classes=classes)
    raise UserError(f"unknown package in {asked!r}: there are timm:NAME and torchvision:NAME")


def ready_made(name: str, classes: int) -> nn.Module:
    """A model of timm, torchvision or this package, as that builds it: "timm:NAME", "torchvision:NAME", or a name that one of
    them knows.

    Raises:
        UserError: none of them knows it, or its package is missing.
    """
    source, colon, rest = ALIASES.get(name, name).partition(":")
    if colon:
        return _from_package(name, source, rest, classes)
    if name in list_models():
        return create_model(name, num_classes=classes, fused=False)
    if why_not("timm") is None and name in optional("timm", name).list_models():
        return _from_package(name, "timm", name, classes)
    return _from_package(name, "torchvision", name, classes)


def _accelerate(model: nn.Module, recipe: Recipe) -> None:
    if recipe.fused == "auto":
        accelerate(model)
        return
    try:
        report = accelerate(model, fused=True)
    except ValueError as error:
        raise UserError(f"--fused on: {error}") from None
    if not report.swapped:
        raise UserError(f"--fused on: {recipe.model} has no blocks with fused kernels")


def synchronized(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Batch normalizations over all processes. Those of timm hold an activation, which timm's own conversion alone keeps."""
    from_timm = ALIASES.get(recipe.model, recipe.model).startswith("timm:")
    conversions = optional("timm", recipe.model).layers if from_timm else nn.SyncBatchNorm
    converted: nn.Module = conversions.convert_sync_batchnorm(model)
    return converted


def _built(asked: str, name: str, known: Iterable[str], builder: Callable[..., nn.Module], **options: Any) -> nn.Module:
    names = list(known)
    if name not in names:
        similar = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or sorted(names)[:5]
        raise UserError(f"unknown model {asked!r}: similar ones are {', '.join(similar)}")
    return builder(name, **options)


def _adapt_to_small_input(model: nn.Module) -> None:
    """Keeps the size of the images in the stem: a 3 x 3 first convolution of stride 1, and no first pooling."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.kernel_size != (3, 3):
                module = nn.Conv2d(module.in_channels, module.out_channels, 3, padding=1, bias=module.bias is not None)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                _replace(model, name, module)
            module.stride = (1, 1)
            break
    for name, module in model.named_modules():
        if isinstance(module, nn.MaxPool2d):
            _replace(model, name, nn.Identity())
            break


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _tapped(recipe: Recipe, model: nn.Module) -> nn.Module:
    if recipe.loss != "bias":
        return model
    if recipe.features_from is None and recipe.model in list_models():
        model.return_features = "variance"  # type: ignore[assignment]
        return model
    module = recipe.features_from or _last_feature_module(recipe.model, model)
    try:
        return FeatureTap(model, module)
    except ValueError as error:
        raise UserError(f"--features-from: {error}") from None


def _last_feature_module(name: str, model: nn.Module) -> str:
    info = getattr(model, "feature_info", None)  # timm's; a list of dicts or an object around one
    if info is not None and len(info) > 0:
        last = info[-1] if isinstance(info, list) else info.get_dicts()[-1]
        return str(last["module"])
    children = [child for child, _ in model.named_children()]
    for module in _FEATURE_MODULES:
        if module in children:
            return module
    raise UserError(
        f"name the module of {name} whose output are the features, --features-from one of {', '.join(children)}"
    )


def _try_out(model: nn.Module, recipe: Recipe, classes: int, channels: int, image_size: int) -> None:
    """One evaluation of two black images: what does not fit is told before anything is written."""
    title = f"{recipe.model} cannot take images of {image_size} x {image_size}"
    try:
        with torch.no_grad():
            outputs = model.eval()(torch.zeros(2, channels, image_size, image_size))
    except Exception as error:  # whatever the model's code raises
        raise UserError(f"{title}: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if isinstance(outputs, tuple) and isinstance(outputs[0], Tensor) and outputs[0].numel() == 0:
        raise UserError(f"{title}: its features are empty")
    if not isinstance(scores_of(outputs), Tensor) or scores_of(outputs).shape != (2, classes):
        raise UserError(f"{recipe.model} does not return scores of shape (N, {classes})")
    model.train()
