"""Networks in evaluation mode, for tests of `optimize_for_inference`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from biasloss_ext import accelerate
from biasloss_ext.models import skipblocknet_xs
from tests.nn import lookalikes
from tests.nn.blocks import randomize


def network() -> Any:
    torch.manual_seed(0)
    model = skipblocknet_xs(num_classes=10)
    randomize(model, torch.Generator().manual_seed(0))
    return model.float().eval()


def accelerated() -> nn.Module:
    torch.manual_seed(0)
    model = lookalikes.network()
    accelerate(model)
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "skipblocknet_xs": network,
    "accelerated": accelerated,
    "blocks of other libraries": lambda: lookalikes.network().eval(),
}
