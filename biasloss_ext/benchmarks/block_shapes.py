"""The workloads of the blocks' ops: every shape that SkipblockNet-M has at 224 x 224."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch

from biasloss_ext.benchmarks.contender import Workload


class Block(NamedTuple):
    """A depthwise-separable block; ``size`` is the height and width of its input, ``hidden`` the units of its gate or 0."""

    channels: int
    expanded: int
    size: int
    kernel_size: int
    stride: int
    outputs: int
    hidden: int = 0

    @property
    def output_size(self) -> int:
        return -(-self.size // self.stride)


BLOCKS = (
    Block(16, 16, 112, 3, 1, 16),
    Block(16, 64, 112, 3, 2, 24),
    Block(24, 72, 56, 3, 1, 24),
    Block(24, 72, 56, 5, 2, 40, 24),
    Block(16, 96, 28, 5, 1, 40),
    Block(40, 120, 28, 5, 1, 40, 32),
    Block(40, 240, 28, 5, 1, 40, 64),
    Block(40, 240, 28, 3, 2, 80),
    Block(16, 40, 14, 3, 1, 80),
    Block(80, 184, 14, 3, 1, 80),
    Block(80, 200, 14, 3, 1, 80),
    Block(80, 480, 14, 3, 1, 112, 120),
    Block(112, 672, 14, 3, 1, 112, 168),
    Block(112, 672, 14, 5, 2, 160, 168),
    Block(160, 960, 7, 5, 1, 160, 240),
)
QUICK_BLOCKS = (Block(40, 240, 28, 5, 1, 40, 64),)
QUICK_DEPTHWISE_BLOCKS = (BLOCKS[1], BLOCKS[6], BLOCKS[14])  # a large map, a middle one, a small one
TINY_BLOCKS = (Block(5, 8, 6, 3, 1, 5, 3), Block(3, 8, 7, 5, 2, 6))

Options = tuple[tuple[str, int], ...]
Shape = tuple[tuple[int, ...], Options]  # of a sample, and the workload's options
Direction = Literal["forward", "backward", "input", "weight"]


def _depthwise(block: Block) -> list[Shape]:
    return [((block.expanded, block.size, block.size), (("kernel_size", block.kernel_size), ("stride", block.stride)))]


def _pointwise(block: Block) -> list[Shape]:
    expansion: Shape = ((block.channels, block.size, block.size), (("outputs", block.expanded), ("norm", 0)))
    map_in = (block.expanded, block.output_size, block.output_size)
    return [expansion, (map_in, (("outputs", block.outputs), ("norm", 1)))]


def _expand_depthwise(block: Block) -> list[Shape]:
    options = (("expanded", block.expanded), ("kernel_size", block.kernel_size), ("stride", block.stride))
    return [((block.channels, block.size, block.size), options)]


def _squeeze_excite(block: Block) -> list[Shape]:
    return [((block.expanded,), (("hidden", block.hidden),))] if block.hidden else []


def _batch_norm(block: Block) -> list[Shape]:
    return [((block.expanded, block.output_size, block.output_size), ())]


def _pool(block: Block) -> list[Shape]:
    """The pool of the gate. The last block's maps are as large as the last convolution's, whose variance is taken too."""
    sample, _ = _batch_norm(block)[0]
    shapes: list[Shape] = [(sample, (("variance", 0),))] if block.hidden else []
    return shapes if block in BLOCKS[:-1] else [*shapes, (sample, (("variance", 1),))]


SHAPES: dict[str, Callable[[Block], list[Shape]]] = {
    "depthwise": _depthwise,
    "pointwise": _pointwise,
    "expand_depthwise": _expand_depthwise,
    "squeeze_excite": _squeeze_excite,
    "pool_variance": _pool,
    "batch_norm": _batch_norm,
}


def workloads(op: str, device_type: str, *, quick: bool = False, tiny: bool = False) -> list[Workload]:
    """Both passes, and for the depthwise convolution each gradient alone."""
    batch, dtype = (256, torch.bfloat16) if device_type == "cuda" else (16, torch.float32)
    if op == "squeeze_excite":
        dtype = torch.float32  # the pool is taken in it
    of_quick = QUICK_DEPTHWISE_BLOCKS if op == "depthwise" else QUICK_BLOCKS
    blocks = TINY_BLOCKS if tiny else of_quick if quick else BLOCKS
    pairs = [(shape, direction) for shape in _distinct(op, blocks) for direction in _directions(op, shape, quick)]
    return [
        Workload(
            op,
            2 if tiny else batch,
            sample,
            dtype=dtype,
            channels_last=None,
            backward=direction == "backward",
            gradient=direction if direction in ("input", "weight") else "",
            options=options,
        )
        for (sample, options), direction in pairs
    ]


def _directions(op: str, shape: Shape, quick: bool) -> tuple[Direction, ...]:
    """Forward, both, and for the depthwise convolution each gradient; quick runs have these for one shape."""
    if op == "depthwise" and (not quick or shape in _distinct(op, QUICK_BLOCKS)):
        return "forward", "backward", "input", "weight"
    return "forward", "backward"


def _distinct(op: str, blocks: Iterable[Block]) -> list[Shape]:
    return list(dict.fromkeys(shape for block in blocks for shape in SHAPES[op](block)))
