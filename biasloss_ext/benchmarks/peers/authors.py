"""The authors' formulation of Bias Loss, op by op in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALPHA = 0.3
BETA = 0.3


def authors_variance(features: Tensor) -> Tensor:
    """(N, *) to (N,), through a copy of the features and, where they are not contiguous, another one."""
    copy = features.clone().detach()
    return torch.var(copy.reshape(copy.shape[0], -1), dim=1)


class AuthorsBiasLoss(nn.Module):
    """Global mode: the running minimum is a Python number, fetched from the device in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.running_min = float("inf")

    def forward(self, features: Tensor, output: Tensor, target: Tensor) -> Tensor:
        variance = authors_variance(features)
        smallest = torch.min(variance)
        largest = torch.max(variance)
        self.running_min = min(self.running_min, smallest.item())
        normalized = (variance - self.running_min) / (largest - smallest)
        weight = torch.exp(normalized * ALPHA) - BETA
        losses = F.cross_entropy(output, target, reduction="none")
        return (weight * losses).mean()
