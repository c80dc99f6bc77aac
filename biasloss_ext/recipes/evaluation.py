"""Accuracy on the test images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from biasloss_ext.recipes.data import Data
from biasloss_ext.recipes.models import scores_of
from biasloss_ext.recipes.order import evaluation_batches
from biasloss_ext.recipes.processes import Processes

TOP5_FROM_CLASSES = 50


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, batch_size: int, processes: Processes, autocast: torch.autocast
) -> dict[str, float]:
    """Test loss and accuracy, over all processes; from 50 classes on also the accuracy of the first five guesses.

    The loss is cross-entropy whatever the model was trained with, so that runs can be compared.

    Returns:
        "loss", "accuracy" and perhaps "top5", accuracies in [0, 1].
    """
    metrics: dict[str, Metric] = {"accuracy": MulticlassAccuracy(data.classes, average="micro")}
    if data.classes >= TOP5_FROM_CLASSES:
        metrics["top5"] = MulticlassAccuracy(data.classes, average="micro", top_k=5)
    accuracy = MetricCollection(metrics).to(processes.device)  # type: ignore[arg-type]
    mean_loss = MeanMetric().to(processes.device)
    training = model.training
    model.eval()
    for images, target in data.test_batches(
        evaluation_batches(data.test_images, batch_size, processes.count, processes.number)
    ):
        with autocast:
            scores: Tensor = scores_of(model(images)).float()
        accuracy.update(scores, target)
        mean_loss.update(F.cross_entropy(scores, target), weight=len(target))
    model.train(training)
    return {"loss": float(mean_loss.compute()), **{name: float(value) for name, value in accuracy.compute().items()}}
