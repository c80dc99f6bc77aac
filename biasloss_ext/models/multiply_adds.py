"""Counting the multiply-adds of a model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_multiply_adds(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> int:
    """Multiply-adds of one image's forward pass in evaluation: convolutions and matrix products, as papers count them.

    Normalisation, activations, pooling and additions are not counted. A copy of the model on the meta device is run,
    which works on shapes alone: this costs no arithmetic and leaves the model as it is.

    Args:
        model: any model that takes one batch of images.
        input_size: channels, height and width of the image.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, *input_size, device="meta"))
    return int(counter.get_total_flops()) // 2
