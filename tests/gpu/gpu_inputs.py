"""Random features, scores and targets on a device."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = ((1, 3, 1, 1), (2, 5, 3, 3), (7, 64, 7, 7), (33, 130, 4, 4), (128, 960, 7, 7))


def make_features(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> Tensor:
    """Samples of different deviation, so that the weights of Bias Loss do not rest on the last digits."""
    generator = torch.Generator().manual_seed(sum(shape))
    deviation = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) * 1.5 + 0.5
    features = (torch.randn(shape, generator=generator) * deviation + 0.5).to(device, dtype)
    return features.contiguous(memory_format=torch.channels_last) if channels_last else features


def make_scores(
    samples: int, classes: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scores that require a gradient, and targets."""
    generator = torch.Generator().manual_seed(samples + classes)
    output = 3 * torch.randn(samples, classes, generator=generator)
    target = torch.randint(classes, (samples,), generator=generator)
    return output.to(device, dtype).requires_grad_(), target.to(device)
