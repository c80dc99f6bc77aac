"""The losses that a recipe can name, all called as ``loss(outputs, target)`` with what the model returns."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext.loss import FusedBiasLoss
from biasloss_ext.recipes.recipe import Recipe

Outputs = Tensor | tuple[Tensor, Tensor]


def build_loss(recipe: Recipe, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """A module that returns ``(loss, weights)``: the mean loss, 0-d, and the w_i (N,) of Bias Loss or None.

    Targets are classes (N,) or probabilities (N, classes).

    Args:
        process_group: Bias Loss takes the smallest and largest variance over all its processes.
    """
    if recipe.loss == "bias":
        loss = FusedBiasLoss(
            recipe.alpha,
            recipe.beta,
            recipe.normalisation_mode,
            label_smoothing=recipe.label_smoothing,
            process_group=process_group,
        )
        module = BiasBinaryCrossEntropy(loss) if recipe.bce else BiasLoss(loss)
        return MeanWeightOne(module) if recipe.mean_weight_one else module
    if recipe.bce:
        return BinaryCrossEntropy(recipe.label_smoothing)
    if recipe.loss == "focal":
        return FocalLoss(recipe.focal_gamma, recipe.label_smoothing)
    return CrossEntropy(recipe.label_smoothing)


class BiasLoss(nn.Module):
    """Bias Loss of ``(features or variance, scores)``."""

    def __init__(self, loss: FusedBiasLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Outputs, target: Tensor) -> tuple[Tensor, Tensor | None]:
        first, scores = outputs
        if first.dim() == 1:
            loss, weights = self.loss(None, scores, target, variance=first, return_weights=True)
        else:
            loss, weights = self.loss(first, scores, target, return_weights=True)
        return loss, weights


class BiasBinaryCrossEntropy(BiasLoss):
    """Bias Loss on the binary cross-entropy: the same weights w_i, times ``binary_cross_entropy`` of each sample."""

    def forward(self, outputs: Outputs, target: Tensor) -> tuple[Tensor, Tensor | None]:
        # The fused loss keeps the running minimum and takes the extrema over all processes; its own value is not used.
        with torch.no_grad():
            _, weights = super().forward(outputs, target)
        assert weights is not None
        return (weights * binary_cross_entropy(outputs[1], target, self.loss.label_smoothing)).mean(), weights


class MeanWeightOne(nn.Module):
    """A weighted loss divided by the mean of its weights in the batch (of this process).

    The weights of Bias Loss average below 1 by default, which makes the steps of SGD smaller. Divided by their mean they
    only set how much the images of a batch count relative to each other.
    """

    def __init__(self, loss: BiasLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Outputs, target: Tensor) -> tuple[Tensor, Tensor | None]:
        loss, weights = self.loss(outputs, target)
        mean = weights.mean()
        return loss / mean, weights / mean


class CrossEntropy(nn.Module):
    """Also the base of the losses of scores alone."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Outputs, target: Tensor) -> tuple[Tensor, Tensor | None]:
        assert isinstance(outputs, Tensor)
        return self.mean(outputs, target), None

    def mean(self, scores: Tensor, target: Tensor) -> Tensor:
        """Of the batch."""
        return F.cross_entropy(scores.float(), target, label_smoothing=self.label_smoothing)


class BinaryCrossEntropy(CrossEntropy):
    def mean(self, scores: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(scores, target, self.label_smoothing).mean()


def binary_cross_entropy(scores: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Of each sample, the mean over the classes: every class is a question of its own, "is it this one?".

    Args:
        scores: (N, classes).
        target: classes (N,) or probabilities (N, classes).

    Returns:
        (N,), float32.
    """
    classes = scores.shape[1]
    if not target.is_floating_point():
        target = F.one_hot(target, classes)
    smoothed = target * (1 - label_smoothing) + label_smoothing / classes
    return F.binary_cross_entropy_with_logits(scores.float(), smoothed.float(), reduction="none").mean(1)


class FocalLoss(CrossEntropy):
    """``mean_i (1 - p_i)^gamma * CE_i`` with p_i the probability of the true class: Lin et al., "Focal Loss for Dense
    Object Detection", ICCV 2017, for many classes. With probability targets p_i is their mean under the scores."""

    def __init__(self, gamma: float = 2.0, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.gamma = gamma

    def mean(self, scores: Tensor, target: Tensor) -> Tensor:
        scores = scores.float()
        entropy = F.cross_entropy(scores, target, label_smoothing=self.label_smoothing, reduction="none")
        if not target.is_floating_point():
            target = F.one_hot(target, scores.shape[1]).float()
        probability = (scores.softmax(1) * target).sum(1)
        # The clamp keeps rounding from taking a fractional power of a negative number.
        factor = (1 - probability).clamp(min=torch.finfo(torch.float32).tiny) ** self.gamma
        return (factor * entropy).mean()
