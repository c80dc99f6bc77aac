"""Chooses the 256 levels of each map from what it holds for the calibration images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from biasloss_ext.nn.quantization.layers import Kind, Layer

SAMPLED = 1 << 15  # values of a map and batch that the error is measured on
CANDIDATES = 11
KEPT = 32 * 3 * 224 * 224  # values of the images that layers are corrected by
SMALLEST = 0.8  # of what was seen, the least that levels may cover: what is rare may be what tells classes apart


class Levels(NamedTuple):
    """A byte q stands for ``step * (q - zero)``."""

    step: float
    zero: int

    @staticmethod
    def between(low: float, high: float) -> Levels:
        """Those that cover a range, in which 0 is a level."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / 255, 1e-8)
        return Levels(torch.tensor(step, dtype=torch.float32).item(), min(255, max(0, round(-low / step))))

    def tensor(self) -> Tensor:
        return torch.tensor([self.step, float(self.zero)], dtype=torch.float32)

    def rounded(self, values: Tensor) -> Tensor:
        """What the bytes of the values stand for."""
        return (values / self.step).round_().add_(self.zero).clamp_(0, 255).sub_(self.zero).mul_(self.step)

    def error(self, values: Tensor) -> float:
        """The mean square of what is lost."""
        return (self.rounded(values) - values).square_().mean().item()


class Seen:
    """Values of one map."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self._samples: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        low, high = values.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError("the calibration images lead to values that are not finite; check them and the weights")
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        flat = values.permute(0, 2, 3, 1).reshape(-1) if values.dim() == 4 else values.reshape(-1)
        step = max(1, flat.numel() // SAMPLED) | 1  # odd, so that no channel is left out
        self._samples.append(flat[::step].clone())

    def levels(self) -> Levels:
        """Those with the least mean square error: a few large values are cut off where all others gain by it."""
        values = torch.cat(self._samples)
        low, high = self.low, self.high
        for end in ("high", "low"):
            tried = []
            for index in range(CANDIDATES):
                share = 1 - (1 - SMALLEST) * index / (CANDIDATES - 1)
                bounds = (low, high * share) if end == "high" else (low * share, high)
                tried.append((Levels.between(*bounds).error(values), index, bounds))
                if bounds == (low, high) and index > 0:  # this end is 0
                    break
            low, high = min(tried)[2]
        return Levels.between(low, high)


class Observer:
    """Runs layers in float32, and looks at the values between them.

    Attributes:
        images: some of those it ran on.
    """

    def __init__(self, layers: list[Layer], output: int) -> None:
        self.layers, self.output = layers, output
        self.seen: dict[int, Seen] = {}
        self.images: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        values = {0: x}
        self.seen.setdefault(0, Seen()).add(x)
        self._keep(x)
        last_reader = {number: layer for layer in self.layers for number in layer.reads}
        for layer in self.layers:
            y = layer(values[layer.input], values.get(layer.other))
            values[layer.output] = y
            self.seen.setdefault(layer.output, Seen()).add(y)
            for number in layer.reads:
                if last_reader[number] is layer and number != self.output:
                    values.pop(number, None)
        return values[self.output]

    def _keep(self, x: Tensor) -> None:
        """Some images of the first size."""
        left = KEPT - sum(map(Tensor.numel, self.images))
        count = min(len(x), max(left // x[0].numel(), 0 if self.images else 1))
        if count > 0 and (not self.images or x.shape[1:] == self.images[0].shape[1:]):
            self.images.append(x[:count].clone())

    def levels(self) -> dict[int, Levels]:
        """Of each value; an average has those of its input."""
        found = {number: seen.levels() for number, seen in self.seen.items()}
        for layer in self.layers:
            if layer.kind is Kind.AVERAGE:
                found[layer.output] = found[layer.input]
        return found
