"""scikit-learn's handwritten digits: 1797 gray images of 8 x 8 that come with the package."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from biasloss_ext.errors import UserError
from biasloss_ext.recipes.data.images import Preprocessing
from biasloss_ext.recipes.data.in_memory import InMemoryData
from biasloss_ext.recipes.recipe import Recipe

TEST_IMAGES = 360


def load_digits(recipe: Recipe, device: torch.device, workers: int) -> InMemoryData:
    """1437 training and 360 test images, enlarged to the image size, the gray value in all three channels.

    The split is always the same, with every class in its proportion: the recipe's seed is that of the augmentation, a shift
    by up to an eighth of the image. Digits are not mirrored.

    Raises:
        UserError: images smaller than the 8 x 8 of the data, or too large for the memory.
    """
    from sklearn import datasets, model_selection

    image_size = recipe.image_size
    if image_size < 8:
        raise UserError(
            f"the digits are 8 x 8 and can be enlarged only: --image-size must be at least 8, got {image_size}"
        )
    needed = 1797 * image_size**2 * 11  # bytes: as float32, as uint8 in three channels, and those padded
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"digits of {image_size} x {image_size} take {needed / 1e9:.0f} GB of memory, this machine has"
            f" {there / 1e9:.0f}: --image-size must be smaller"
        )
    digits = datasets.load_digits()
    gray = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    enlarged = F.interpolate(gray, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = enlarged.round().to(torch.uint8).expand(-1, 3, -1, -1)
    classes = torch.from_numpy(digits.target).long()
    train, test = model_selection.train_test_split(
        range(len(classes)), test_size=TEST_IMAGES, stratify=digits.target, random_state=0
    )
    return InMemoryData(
        (images[train], classes[train]),
        (images[test], classes[test]),
        class_names=tuple(str(digit) for digit in range(10)),
        preprocessing=Preprocessing(image_size, image_size, (0.31,) * 3, (0.34,) * 3, gray=True),
        padding=image_size // 8,
        flip=False,
        seed=recipe.seed,
        device=device,
    )
