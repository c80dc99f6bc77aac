"""How the variance that Bias Loss weights by goes with an image's loss, margin, class and a wrong label."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from biasloss_ext.diversity import layer_variances, summarize
from biasloss_ext.functional import feature_variance
from biasloss_ext.recipes import checkpoint
from biasloss_ext.recipes.data import Data
from biasloss_ext.recipes.models import build_model
from biasloss_ext.recipes.order import evaluation_batches
from biasloss_ext.recipes.processes import Processes
from biasloss_ext.recipes.recipe import Recipe
from biasloss_ext.recipes.run_data import open_data
from biasloss_ext.recipes.trained import load_trained

BATCH = 250
IMAGES = 2_000  # at most so many test images, and so many training images

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Samples:
    """One number per image, each (n,): the variance of the last feature map, cross-entropy, margin, label, rightness."""

    variance: Tensor
    loss: Tensor
    margin: Tensor
    label: Tensor


def analyze(recipe: Recipe, folder: Path, here: Processes) -> dict[str, Any]:
    """What the model of a finished run does with images.

    Returns:
        "test" and "train": see :func:`relations`; "layers": the distribution of the variance in each layer over test
        images, as `biasloss diversity` gives it.
    """
    data = open_data(recipe, here, 0).data
    model = _with_features(recipe, folder, data)
    test = evaluation_batches(min(data.test_images, IMAGES), BATCH)
    train = evaluation_batches(min(data.train_images, IMAGES), BATCH)
    wrong = None
    if recipe.label_noise:
        clean = open_data(dataclasses.replace(recipe, label_noise=0.0), here, 0).data.train_classes
        wrong = (clean != data.train_classes)[torch.cat(train)]
    of_layers = layer_variances(load_trained(folder), (images for images, _ in data.test_batches(test)))
    return {
        "test": relations(samples_of(model, data.test_batches(test))),
        "train": relations(samples_of(model, data.train_batches(recipe.epochs - 1, train)), wrong),
        "layers": [
            {"layer": row.layer, "mean": row.mean, **row.quantiles, "below": row.below}
            for row in summarize({"": of_layers})
        ],
    }


def _with_features(recipe: Recipe, folder: Path, data: Data) -> nn.Module:
    """The trained model, returning its feature map (or variance) and the scores whatever its loss was."""
    path = str(folder / checkpoint.NAME)
    to_build = dataclasses.replace(recipe, loss="bias", weights=path)
    return build_model(to_build, data.classes, data.channels, data.image_size).eval()


@torch.no_grad()
def samples_of(model: nn.Module, batches: Batches) -> Samples:
    """The figures of every image; ``model`` returns features (n, *) or their variance (n,), and scores (n, classes)."""
    parts = []
    for images, label in batches:
        first, scores = model(images)
        variance = first if first.dim() == 1 else feature_variance(first)
        loss = F.cross_entropy(scores, label, reduction="none")
        own = scores.gather(1, label[:, None])[:, 0]
        others = scores.scatter(1, label[:, None], -torch.inf).amax(1)
        parts.append((variance.double(), loss.double(), (own - others).double(), label))
    return Samples(*(torch.cat(column) for column in zip(*parts, strict=True)))


def relations(samples: Samples, wrong: Tensor | None = None) -> dict[str, Any]:
    """Rank correlations of the variance and its distribution over classes.

    Args:
        wrong: (n,), bool: whose label is wrong on purpose.

    Returns:
        "loss", "margin": Spearman's rank correlation of the variance with them. "class_share": share of the variance's
        spread that lies between classes (eta squared). "class_means": mean variance of each class beside that of all.
        "misclassified": probability that an image classified wrongly has a higher variance than one classified rightly.
        "wrong_label": the same of images whose label is wrong, if there are any. 0.5 means that variance tells nothing.
    """
    variance = samples.variance
    classes = [variance[samples.label == number] for number in samples.label.unique()]
    between = sum(len(part) * float(part.mean() - variance.mean()) ** 2 for part in classes)
    spread = float((variance - variance.mean()).square().sum())
    found: dict[str, Any] = {
        "images": len(variance),
        "loss": _rank_correlation(variance, samples.loss),
        "margin": _rank_correlation(variance, samples.margin),
        "class_share": between / spread if spread else 0.0,
        "class_means": [float(part.mean() / variance.mean()) for part in classes],
        "misclassified": _higher(variance, samples.margin < 0),
    }
    if wrong is not None:
        found["wrong_label"] = _higher(variance, wrong)
    return found


def _rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """None if one of them is constant."""
    if first.min() == first.max() or second.min() == second.max():
        return None
    return float(stats.spearmanr(first.numpy(), second.numpy()).statistic)


def _higher(values: Tensor, chosen: Tensor) -> float | None:
    """The probability that a chosen value is above one of the others; None if there are none."""
    if not 0 < int(chosen.sum()) < len(chosen):
        return None
    test = stats.mannwhitneyu(values[chosen].numpy(), values[~chosen].numpy())
    return float(test.statistic) / (int(chosen.sum()) * int((~chosen).sum()))
