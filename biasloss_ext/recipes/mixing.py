"""Mixup and CutMix, through torchvision."""

from __future__ import annotations

import torch
from torch import Tensor

from biasloss_ext.recipes.optional import torchvision
from biasloss_ext.recipes.order import seeded
from biasloss_ext.recipes.recipe import Recipe


class Mixing:
    """Mixes the images and classes of a batch, or hands them on where the recipe asks for none.

    Where it asks for both, every batch takes one of the two at random. The random numbers depend on the seed, the
    process and the place in the run.
    """

    def __init__(self, recipe: Recipe, classes: int, process: int) -> None:
        self._key = (recipe.seed, process)
        self._transform = None
        if recipe.mixup > 0 or recipe.cutmix > 0:
            v2 = torchvision("mixup or cutmix").transforms.v2
            transforms = [v2.MixUp(alpha=recipe.mixup, num_classes=classes)] if recipe.mixup > 0 else []
            transforms += [v2.CutMix(alpha=recipe.cutmix, num_classes=classes)] if recipe.cutmix > 0 else []
            self._transform = v2.RandomChoice(transforms)

    def __call__(self, images: Tensor, target: Tensor, place: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Images and classes (N,) to images and, where they are mixed, probabilities (N, classes)."""
        if self._transform is None:
            return images, target
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(seeded(*self._key, *place, 2).get_state())
            images, target = self._transform(images, target)
        return images, target
