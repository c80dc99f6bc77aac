"""Weights drawn at random that make every layer count, under whatever names a model has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def random_state(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict of these keys and shapes; with it, a SkipblockNet's scores are near 1 and vary with the image."""
    torch.manual_seed(0)
    return {key: _random_tensor(key, shape, dtype) for key, shape in shapes.items()}


def _random_tensor(key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    kind = key.rsplit(".", 1)[1]
    if kind == "num_batches_tracked":
        return torch.tensor(7)
    if kind == "running_var" or (kind == "weight" and len(shape) == 1):
        return torch.rand(shape, dtype=dtype) + 0.5
    # Linear layers and convolutions about keep the scale of their input.
    deviation = math.sqrt(1 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return deviation * torch.randn(shape, dtype=dtype)
