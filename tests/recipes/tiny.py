"""Runs small enough for a test: a few colored images in CIFAR's format, and SkipblockNet-XS on them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from biasloss_ext.recipes import loop
from biasloss_ext.recipes.display import Display
from biasloss_ext.recipes.loop import train
from biasloss_ext.recipes.outcome import Outcome
from biasloss_ext.recipes.recipe import Recipe, make_recipe
from biasloss_ext.recipes.weights import load_weights

Fails = Callable[..., str]  # the fixture `fails`

FILES = {
    "cifar10": ("cifar-10-batches-py", [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"], b"labels"),
    "cifar100": ("cifar-100-python", ["train", "test"], b"fine_labels"),
}


def write_cifar(parent: Path, name: str = "cifar10", images: int = 16) -> Path:
    """So many images in each file; their brightness tells the class. Returns ``parent``."""
    folder, files, labels = FILES[name]
    (parent / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for file in files:
        classes = np.arange(images) % 10
        pixels = generator.integers(0, 60, (images, 3072)) + 18 * classes[:, None]
        content = {b"data": pixels.astype(np.uint8), labels: classes.tolist()}
        (parent / folder / file).write_bytes(pickle.dumps(content, protocol=2))
    return parent


def tiny_recipe(data_dir: Path, **options: Any) -> Recipe:
    """80 training images in 5 steps, two epochs."""
    tiny = {"model": "skipblocknet_xs", "small_input": False, "epochs": 2, "batch_size": 16, "lr": 0.05}
    return make_recipe(options.pop("data", "cifar10"), data_dir=str(data_dir), **{**tiny, **options})


def run(
    data_dir: Path,
    out: Path,
    display: Display | None = None,
    checkpoint_steps: int = 0,
    fresh: bool = False,
    **options: Any,
) -> Outcome:
    """A whole tiny run, without a word."""
    return train(
        tiny_recipe(data_dir, **options),
        out,
        device="cpu",
        checkpoint_steps=checkpoint_steps,
        fresh=fresh,
        display=display or Display(shown=False),
    )


class Interrupting(Display):
    """Breaks the run off in its n-th step."""

    def __init__(self, steps: int) -> None:
        super().__init__(shown=False)
        self._left = steps

    def step(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


class LinearModel(nn.Module):
    """Without batch normalization and dropout, so that a batch can be cut: features and scores."""

    def __init__(self, with_features: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * 32 * 32, 12)
        self.scores = nn.Linear(12, 10)
        self.with_features = with_features

    def forward(self, images: Tensor) -> Any:
        features = self.hidden(images.flatten(1)).relu()
        scores = self.scores(features)
        return (features.detach(), scores) if self.with_features else scores


class SmallLinear(nn.Module):
    """For any number of classes."""

    def __init__(self, classes: int, size: int = 16) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * size * size, 8)
        self.scores = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(self.hidden(images.flatten(1)).relu())


def build_small(recipe: Recipe, classes: int, channels: int, size: int, notes: list[str] | None = None) -> nn.Module:
    """In place of ``build_model``."""
    model = SmallLinear(classes, size)
    if recipe.weights is not None:
        load_weights(model, Path(recipe.weights), f"linear with {classes} classes", notes)
    return model


def use_linear_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop, "build_model", lambda recipe, *_: LinearModel(recipe.loss == "bias"))


def checkpoint_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Equal to the bit, but for the seconds that passed."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), place
        return
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{place}[{number}]")
    else:
        assert a == b, place
