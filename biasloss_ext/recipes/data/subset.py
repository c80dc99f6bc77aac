"""Training on fewer images, and on labels of which some are wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.base import Data
from biasloss_ext.recipes.order import seeded
from biasloss_ext.recipes.recipe import Recipe


def restrict(data: Data, recipe: Recipe) -> list[str]:
    """Leaves ``data`` the training images and labels that the recipe asks for; test images stay as they are.

    Returns:
        Sentences for the user.

    Raises:
        UserError: a subset larger than the data set, or smaller than the number of classes.
    """
    notes = []
    classes, available = data.train_classes, len(data.train_classes)
    indices = torch.arange(available)
    if recipe.train_images:
        if not data.classes <= recipe.train_images <= available:
            raise UserError(
                f"--train-images must be from {data.classes}, one image of each class, to {available}, all of"
                f" {recipe.data}, got {recipe.train_images}"
            )
        indices = stratified(classes, recipe.train_images, recipe.seed)
        classes = classes[indices]
        notes.append(f"training on {len(indices)} of {available} images (--train-images)")
    if recipe.label_noise:
        clean = classes
        classes = with_noise(clean, data.classes, recipe.label_noise, recipe.seed)
        wrong = int((classes != clean).sum())
        notes.append(f"{wrong} of {len(classes)} training labels are wrong on purpose (--label-noise)")
    if notes:
        data.keep(indices, classes)
    return notes


def stratified(classes: Tensor, images: int, seed: int) -> Tensor:
    """Which images to take: at least one of every class, and of all classes the same share to within one image.

    The subset is a function of the classes, ``images`` and the seed. With one seed, a smaller subset is part of a larger
    one.

    Args:
        classes: (n,), int64.
        images: from the number of classes to n.

    Returns:
        (images,), int64, ascending.
    """
    shuffled = torch.randperm(len(classes), generator=seeded(seed, 0, 2))
    by_class = shuffled[classes[shuffled].argsort(stable=True)]
    counts = classes.bincount()
    counts = counts[counts > 0]
    # An image's place is the share of its class at which it joins; the first of a class always joins.
    places = [torch.cat((torch.zeros(1), (torch.arange(1, count) + 0.5) / count)) for count in counts.tolist()]
    return by_class[torch.cat(places).argsort(stable=True)[:images]].sort().values


def with_noise(classes: Tensor, number: int, share: float, seed: int) -> Tensor:
    """The classes (n,), of which ``round(share * n)`` are replaced by another of the ``number`` classes, each as likely."""
    generator = seeded(seed, 0, 3)
    chosen = torch.randperm(len(classes), generator=generator)[: round(share * len(classes))]
    shifts = torch.randint(1, number, (len(chosen),), generator=generator)
    noisy = classes.clone()
    noisy[chosen] = (classes[chosen] + shifts) % number
    return noisy
