"""torchvision's MobileNetV3-Large, the network that SkipblockNet is compared with."""

from __future__ import annotations

from torch import nn

from biasloss_ext.benchmarks.contender import Unavailable


def mobilenet_v3_large(num_classes: int) -> nn.Module:
    """The network without dropout, weights drawn at random; `Unavailable` where torchvision does not import."""
    try:
        from torchvision.models import mobilenet_v3_large as build
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision built for another torch
        reason = str(error).splitlines()[0]
        raise Unavailable(f"torchvision cannot be imported: {reason}") from None
    model: nn.Module = build(num_classes=num_classes, dropout=0.0)
    return model
