"""Launches of the loss and of the variance that SkipblockNet's training, dense prediction and language models make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from biasloss_ext.ops.bias_loss import triton as bias_loss
from biasloss_ext.ops.bias_loss.reference import MEAN, NONE, SUM
from biasloss_ext.ops.feature_variance import triton as feature_variance

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def loss(
    features: torch.dtype,
    output: torch.dtype,
    samples: int = 256,
    maps: tuple[int, ...] = (960, 7, 7),
    classes: int = 1000,
    positions: int | None = None,
    probabilities: bool = False,
    smoothing: float = 0.0,
    weighted: bool = False,
    variance: bool = False,
    reduction: int = MEAN,
) -> Callable[[], None]:
    """Forward and backward launches. The values of the tensors are never looked at."""

    def launch() -> None:
        dense = () if positions is None else (positions,)
        scores = torch.empty(samples, classes, *dense, dtype=output)
        target = torch.empty_like(scores) if probabilities else torch.empty(samples, *dense, dtype=torch.int64)
        accumulated = F64 if output == F64 else F32
        class_weight = torch.empty(classes, dtype=accumulated) if weighted else None
        given = torch.empty(samples, dtype=accumulated) if variance else None
        maps_of_batch = None if variance else torch.empty(samples, *maps, dtype=features)
        outputs = bias_loss.bias_loss(
            maps_of_batch,
            given,
            None,
            scores,
            target,
            class_weight,
            torch.empty(()),
            0.3,
            0.3,
            True,
            reduction,
            -100,
            smoothing,
        )
        bias_loss.bias_loss_backward(outputs[0], scores, target, class_weight, *outputs[1:], reduction, -100, smoothing)

    return launch


def moments(dtype: torch.dtype, samples: int, *maps: int) -> Callable[[], None]:
    def launch() -> None:
        feature_variance.feature_variance(torch.empty(samples, *maps, dtype=dtype))

    return launch


LOSS_LAUNCHES: dict[str, Callable[[], Any]] = {
    "variance bfloat16": moments(BF16, 256, 960, 7, 7),
    "variance float32, many slices": moments(F32, 16, 960, 14, 14),
    "variance float64, one slice": moments(F64, 600, 96, 5, 5),
    "loss bfloat16": loss(BF16, BF16),
    "loss float16": loss(F16, F16),
    "loss float32": loss(F32, F32),
    "loss float64": loss(F64, F64, samples=16, smoothing=0.1, weighted=True),
    "loss float32, bfloat16 scores, few classes": loss(F32, BF16, maps=(512, 4, 4), classes=100, smoothing=0.1),
    "loss float16, unaligned features": loss(F16, F32, maps=(9, 7, 7), classes=10, reduction=SUM),
    "loss smoothed, weighted": loss(BF16, F32, smoothing=0.1, weighted=True),
    "loss probabilities": loss(BF16, BF16, probabilities=True, smoothing=0.1, weighted=True),
    "loss dense": loss(BF16, BF16, samples=8, classes=21, positions=16384),
    "loss dense probabilities": loss(
        BF16, F32, samples=8, classes=150, positions=4096, probabilities=True, reduction=NONE
    ),
    "loss long rows": loss(F32, F32, samples=64, classes=128256),
    "loss variance given": loss(F32, F32, variance=True, reduction=NONE),
}
