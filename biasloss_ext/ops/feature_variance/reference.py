"""Per-sample variance in plain PyTorch: the fallback on every device and the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from biasloss_ext.ops.library import accumulation_dtype


def feature_variance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased variance of every sample and the batch's extrema; see :func:`biasloss_ext.functional.feature_variance`.

    Two passes, deviations from the mean in the second: no cancellation however far the mean lies from zero.
    """
    samples = features.detach().flatten(1) if features.dim() > 1 else features.detach().unsqueeze(1)
    samples = samples.to(accumulation_dtype(features.dtype))
    count = samples.shape[1]
    if count == 1:
        variance = samples[:, 0] * 0  # keeps a NaN
    else:
        variance = (samples - samples.mean(1, keepdim=True)).square().sum(1) / (count - 1)
    return variance, extrema_of(variance)


def extrema_of(variance: Tensor) -> Tensor:
    """``(-min, max)`` of a batch of variances, a form that one maximum reduces over ranks.

    ``(inf, inf)`` where a variance is NaN or infinite: every maximum hands it on, while a NaN could be lost in a
    collective. ``(-inf, -inf)``, the neutral element, for an empty batch.
    """
    if variance.shape[0] == 0:
        return variance.new_full((2,), -torch.inf)
    extrema = torch.stack((-variance.amin(), variance.amax()))
    return torch.where(variance.isfinite().all(), extrema, torch.inf)
