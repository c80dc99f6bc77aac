"""Counting the multiply-adds of a model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_multiply_adds(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> int:
    """Count the multiply-adds of one image's forward pass in evaluation, as papers do: convolutions and matrix products.

    Normalization, activations, pooling and additions do not count. The function runs a copy of the model on the meta device,
    which only computes shapes. The model does not change.

    Args:
        model: any model that takes one batch of images.
        input_size: channels, height and width of the image.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, *input_size, device="meta"))
    return int(counter.get_total_flops()) // 2
