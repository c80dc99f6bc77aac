"""Liger-Kernel's cross-entropy, a Triton kernel for GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from biasloss_ext.benchmarks.contender import Unavailable


def liger_cross_entropy(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The function, or `Unavailable`. It overwrites the scores with their gradient."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy as function
    except ImportError as error:
        raise Unavailable(f"Liger-Kernel cannot be imported: {error}") from None
    if device.type != "cuda":
        raise Unavailable("Liger-Kernel's cross-entropy runs on GPUs alone")
    return lambda output, target: function(output, target)
