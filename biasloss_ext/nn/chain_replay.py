"""The launches of a chain on a GPU, recorded by its first step and replayed by later ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biasloss_ext.ops.backends import choose
from biasloss_ext.ops.registry import is_traced
from biasloss_ext.ops.replay import Recordings, Tensors, replayed

if TYPE_CHECKING:
    from biasloss_ext.nn.chain_parts import Options

_forwards: Recordings = {}
_backwards: Recordings = {}


def is_recorded(options: Options, x: Tensor) -> bool:
    """Whether the chain runs on Triton's kernels, whose launches are made in Python, and nothing traces it; calls of other
    processes are no launches."""
    on_triton = choose(options.backend, x.device, "pointwise") == "triton"
    if not on_triton or is_traced(x):
        return False
    return not any(step.is_recomputed or step.norm.sync is not None or step.dilation > 1 for step in options.steps)


def forward(
    options: Options,
    constants: Sequence[Tensor | None],
    x: Tensor,
    residual: Tensor | None,
    weights: Sequence[Tensor | None],
    run: Callable[[], Tensors],
) -> Tensors:
    """The results of ``run``, which computes the chain's output and what it saves."""
    running: list[Tensor | None] = []
    for step in options.steps:
        if step.norm.running is not None:
            running += step.norm.running[:3]
    inputs = (x, None if options.adds_input else residual, *constants, *weights, *running)
    key = (*_of_options(options, x), _shapes(weights), _layout(x), _layout(residual), _dtypes(inputs))
    return replayed(_forwards, key, inputs, run)


def backward(
    options: Options,
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    run: Callable[[], Tensors],
) -> Tensors:
    """The results of ``run``, which computes the gradients of the input and of the parameters."""
    inputs = (grad, x, *weights, *saved)
    key = (*_of_options(options, x), _shapes(weights), _layout(x), _layout(grad), _dtypes(inputs))
    return replayed(_backwards, key, inputs, run)


def _layout(x: Tensor | None) -> Hashable:
    return None if x is None else (x.shape, x.stride())


def _shapes(tensors: Sequence[Tensor | None]) -> Hashable:
    return tuple([None if t is None else t.shape for t in tensors])


def _dtypes(tensors: Tensors) -> Hashable:
    """Which tensors are given, and of what they are."""
    return tuple([None if t is None else t.dtype for t in tensors])


def description(options: Options) -> Hashable:
    """What options say about launches: all but which running statistics change."""
    steps = tuple(
        [
            (*step[:7], norm.eps, norm.frozen, None if norm.running is None else norm.running.momentum)
            for step in options.steps
            for norm in (step.norm,)
        ]
    )
    return steps, options.adds_input, options.backend


def _of_options(options: Options, x: Tensor) -> tuple[Hashable, ...]:
    # Products of float32 are exact, or rounded where torch is told so.
    precision = torch._C._get_fp32_precision_getter("cuda", "matmul") if x.dtype is torch.float32 else None
    return x.device, options.description or description(options), precision
