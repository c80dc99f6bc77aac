"""Launches of the loss and of the variance that SkipblockNet's training, dense prediction and language models make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from biasloss_ext.ops.bias_loss import triton as bias_loss
from biasloss_ext.ops.bias_loss.reference import MEAN, NONE, SUM
from biasloss_ext.ops.feature_variance import triton as feature_variance

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass
class Loss:
    """Forward and backward launches. The values of the tensors are never looked at."""

    features: torch.dtype
    output: torch.dtype
    samples: int = 256
    maps: tuple[int, ...] = (960, 7, 7)
    classes: int = 1000
    positions: int | None = None
    probabilities: bool = False
    smoothing: float = 0.0
    weighted: bool = False
    variance: bool = False
    reduction: int = MEAN

    def __call__(self) -> None:
        dense = () if self.positions is None else (self.positions,)
        scores = torch.empty(self.samples, self.classes, *dense, dtype=self.output)
        target = (
            torch.empty_like(scores) if self.probabilities else torch.empty(self.samples, *dense, dtype=torch.int64)
        )
        accumulated = F64 if self.output == F64 else F32
        class_weight = torch.empty(self.classes, dtype=accumulated) if self.weighted else None
        given = torch.empty(self.samples, dtype=accumulated) if self.variance else None
        maps_of_batch = None if self.variance else torch.empty(self.samples, *self.maps, dtype=self.features)
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
            self.reduction,
            -100,
            self.smoothing,
        )
        bias_loss.bias_loss_backward(
            outputs[0], scores, target, class_weight, *outputs[1:], self.reduction, -100, self.smoothing
        )


def moments(dtype: torch.dtype, samples: int, *maps: int) -> Callable[[], None]:
    def launch() -> None:
        feature_variance.feature_variance(torch.empty(samples, *maps, dtype=dtype))

    return launch


LOSS_LAUNCHES: dict[str, Callable[[], Any]] = {
    "variance bfloat16": moments(BF16, 256, 960, 7, 7),
    "variance float32, many slices": moments(F32, 16, 960, 14, 14),
    "variance float64, one slice": moments(F64, 600, 96, 5, 5),
    "loss bfloat16": Loss(BF16, BF16),
    "loss float16": Loss(F16, F16),
    "loss float32": Loss(F32, F32),
    "loss float64": Loss(F64, F64, samples=16, smoothing=0.1, weighted=True),
    "loss float32, bfloat16 scores, few classes": Loss(F32, BF16, maps=(512, 4, 4), classes=100, smoothing=0.1),
    "loss float16, unaligned features": Loss(F16, F32, maps=(9, 7, 7), classes=10, reduction=SUM),
    "loss smoothed, weighted": Loss(BF16, F32, smoothing=0.1, weighted=True),
    "loss probabilities": Loss(BF16, BF16, probabilities=True, smoothing=0.1, weighted=True),
    "loss dense": Loss(BF16, BF16, samples=8, classes=21, positions=16384),
    "loss dense probabilities": Loss(
        BF16, F32, samples=8, classes=150, positions=4096, probabilities=True, reduction=NONE
    ),
    "loss long rows": Loss(F32, F32, samples=64, classes=128256),
    "loss variance given": Loss(F32, F32, variance=True, reduction=NONE),
}
