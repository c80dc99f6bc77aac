"""RandAugment and random erasing, through torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from biasloss_ext.recipes.optional import torchvision
from biasloss_ext.recipes.order import seeded
from biasloss_ext.recipes.recipe import Recipe

T = TypeVar("T")
Key = tuple[int, int, int]  # seed, epoch and image


def augmentation_of(recipe: Recipe) -> Augmentation | None:
    """What the recipe asks for, or None.

    Raises:
        UserError: torchvision cannot be imported.
    """
    return Augmentation(recipe) if recipe.rand_augment or recipe.random_erasing else None


class Augmentation:
    """What the recipe adds to the crops and mirroring of training images.

    Random numbers depend on the key alone.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._rand_augment: Callable[[Any], Any] | None = None
        self._erasing: Callable[[Any], Any] | None = None
        if recipe.rand_augment:
            v2 = torchvision("RandAugment (--rand-augment)").transforms.v2
            self._rand_augment = v2.RandAugment(magnitude=recipe.rand_augment)
        if recipe.random_erasing:
            v2 = torchvision("random erasing (--random-erasing)").transforms.v2
            self._erasing = v2.RandomErasing(recipe.random_erasing)

    def of_pixels(self, image: T, key: Key) -> T:
        """A PIL image, or uint8 (channels, height, width): changed by two operations of RandAugment."""
        return _seeded_call(self._rand_augment, image, key, 4)

    def of_normalized(self, image: Tensor, key: Key) -> Tensor:
        """(channels, height, width), normalized: a rectangle is set to 0, the mean of the data."""
        return _seeded_call(self._erasing, image, key, 5)


def _seeded_call(transform: Callable[[Any], Any] | None, image: T, key: Key, purpose: int) -> T:
    if transform is None:
        return image
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(seeded(*key, purpose).get_state())
        changed: T = transform(image)
    return changed
