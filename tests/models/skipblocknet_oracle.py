"""SkipblockNet-M a second time, from its description: functions of a state dict that share no code with the package.

Everything is written out from convolutions, matrix products and elementary operations, to be run in float64. The
running statistics in the state dict are replaced in training mode, as batch normalization does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]

# kernel, squeeze-and-excite, hard-swish, stride; channels are the state dict's.
STAGES = [
    [(3, False, False, 2), (3, False, False, 1), (5, True, False, 2), (5, True, False, 1), (5, True, True, 1)],
    [(3, False, True, 2), (3, False, True, 1), (3, False, True, 1), (3, False, True, 1)],
    [(3, True, True, 1), (3, True, True, 1)],
    [(5, True, True, 2), (5, True, True, 1), (5, True, True, 1)],
]


def hard_swish(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


def hard_sigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def batch_norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    if training:
        mean = x.mean((0, 2, 3))
        squares = (x - mean[:, None, None]).square()
        variance = squares.mean((0, 2, 3))
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            unbiased = squares.sum((0, 2, 3)) / (count - 1)
            state[f"{name}.running_mean"] = 0.9 * state[f"{name}.running_mean"] + 0.1 * mean
            state[f"{name}.running_var"] = 0.9 * state[f"{name}.running_var"] + 0.1 * unbiased
            state[f"{name}.num_batches_tracked"] = state[f"{name}.num_batches_tracked"] + 1
    else:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    normalized = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return normalized * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def pointwise(state: State, name: str, x: Tensor) -> Tensor:
    return torch.einsum("oi,nihw->nohw", state[f"{name}.weight"][:, :, 0, 0], x)


def depthwise(state: State, name: str, x: Tensor, kernel: int, stride: int) -> Tensor:
    weight = state[f"{name}.weight"]
    height, width = (-(-size // stride) for size in x.shape[2:])
    padded = F.pad(x, (kernel // 2,) * 4)
    result = torch.zeros((), dtype=x.dtype)
    for row in range(kernel):
        for column in range(kernel):
            rows = slice(row, row + stride * (height - 1) + 1, stride)
            columns = slice(column, column + stride * (width - 1) + 1, stride)
            result = result + padded[:, :, rows, columns] * weight[:, 0, row, column, None, None]
    return result


def squeeze_excite(state: State, name: str, x: Tensor) -> Tensor:
    pooled = x.mean((2, 3))
    hidden = relu(pooled @ state[f"{name}.fc.0.weight"].T + state[f"{name}.fc.0.bias"])
    gate = hard_sigmoid(hidden @ state[f"{name}.fc.2.weight"].T + state[f"{name}.fc.2.bias"])
    return x * gate[:, :, None, None]


def average_pool(x: Tensor, size: torch.Size) -> Tensor:
    """Each output cell is the mean of the input cells that it covers, wholly or in part."""

    def weights(source: int, target: int) -> Tensor:
        matrix = torch.zeros(target, source, dtype=x.dtype)
        for cell in range(target):
            first, last = cell * source // target, -(-(cell + 1) * source // target)
            matrix[cell, first:last] = 1 / (last - first)
        return matrix

    return torch.einsum("ph,nchw,qw->ncpq", weights(x.shape[2], size[0]), x, weights(x.shape[3], size[1]))


def inverted_residual(
    state: State, name: str, x: Tensor, kernel: int, excite: bool, swish: bool, stride: int, training: bool
) -> Tensor:
    activation = hard_swish if swish else relu
    y = activation(batch_norm(state, f"{name}.conv.1", pointwise(state, f"{name}.conv.0", x), training))
    y = depthwise(state, f"{name}.conv.3", y, kernel, stride)
    y = activation(batch_norm(state, f"{name}.conv.4", y, training))
    if excite:
        y = squeeze_excite(state, f"{name}.conv.6", y)
    y = batch_norm(state, f"{name}.conv.8", pointwise(state, f"{name}.conv.7", y), training)
    return x + y if stride == 1 and x.shape == y.shape else y


def skip_block(state: State, name: str, early: Tensor, size: torch.Size, kernel: int, training: bool) -> Tensor:
    y = pointwise(state, f"{name}.core_block.0", average_pool(early, size))
    y = relu(batch_norm(state, f"{name}.core_block.1", y, training))
    y = depthwise(state, f"{name}.core_block.3", y, kernel, 1)
    y = relu(batch_norm(state, f"{name}.core_block.4", y, training))
    return batch_norm(state, f"{name}.core_block.7", pointwise(state, f"{name}.core_block.6", y), training)


def skipblocknet_m(state: State, images: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """Features and scores, without dropout."""
    x = F.conv2d(images, state["first_layer.0.weight"], stride=2, padding=1)
    x = hard_swish(batch_norm(state, "first_layer.1", x, training))
    base = inverted_residual(state, "base_block", x, 3, False, True, 1, training)

    x = base
    for stage, blocks in enumerate(STAGES):
        for index, block in enumerate(blocks):
            x = inverted_residual(state, f"blocks.{stage}.{index}", x, *block, training)
        if stage == 0:
            x = x + skip_block(state, "skip1", base, x.shape[2:], 5, training)
        if stage == 1:
            x = x + skip_block(state, "skip2", base, x.shape[2:], 3, training)

    features = hard_swish(batch_norm(state, "conv.1", pointwise(state, "conv.0", x), training))
    hidden = features.mean((2, 3)) @ state["classifier.0.weight"].T + state["classifier.0.bias"]
    scores = hard_swish(hidden) @ state["classifier.3.weight"].T + state["classifier.3.bias"]
    return features, scores
