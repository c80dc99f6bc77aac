"""The launches of a fused block on a GPU, recorded by its first step and replayed by later ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biasloss_ext.ops.backends import choose
from biasloss_ext.ops.registry import is_traced
from biasloss_ext.ops.replay import Recordings, Tensors, replayed

if TYPE_CHECKING:
    from biasloss_ext.nn.block_function import Constants, Options, Saved, Weights

_forwards: Recordings = {}
_backwards: Recordings = {}


def is_recorded(options: Options, x: Tensor) -> bool:
    """Whether the block runs on Triton's kernels, whose launches are made in Python, and nothing traces it."""
    on_triton = choose(options.backend, x.device, "pointwise") == "triton"
    return on_triton and not options.expand_free and not is_traced(x)


def forward(
    options: Options, constants: Constants, x: Tensor, residual: Tensor | None, w: Weights, run: Callable[[], Tensors]
) -> Tensors:
    """The results of ``run``, which computes the block's output and what it saves."""
    running = [t for norm in options.norms if norm.running is not None for t in norm.running[:3]]
    inputs = (x, None if options.adds_input else residual, *constants, *w, *running)
    key = (*_of_options(options, x), *_of_weights(w), _layout(x), _layout(residual), _dtypes(inputs))
    return replayed(_forwards, key, inputs, run)


def backward(
    options: Options, grad: Tensor, x: Tensor, w: Weights, saved: Saved, run: Callable[[], Tensors]
) -> Tensors:
    """The results of ``run``, which computes the gradients of the input and of the parameters."""
    inputs = (grad, x, *w, *saved)
    key = (*_of_options(options, x), *_of_weights(w), _layout(x), _layout(grad), _dtypes(inputs))
    return replayed(_backwards, key, inputs, run)


def _layout(x: Tensor | None) -> Hashable:
    return None if x is None else (x.shape, x.stride())


def _dtypes(tensors: Tensors) -> Hashable:
    """Which tensors are given, and of what they are."""
    return tuple([None if t is None else t.dtype for t in tensors])


def _of_options(options: Options, x: Tensor) -> tuple[Hashable, ...]:
    norms = tuple(
        [(norm.eps, norm.frozen, None if norm.running is None else norm.running.momentum) for norm in options.norms]
    )
    # Products of float32 are exact, or rounded where torch is told so.
    precision = torch._C._get_fp32_precision_getter("cuda", "matmul") if x.dtype is torch.float32 else None
    activations_and_stride = options[:5]
    return x.device, norms, activations_and_stride, options.adds_input, options.expand_free, options.backend, precision


def _of_weights(w: Weights) -> tuple[Hashable, ...]:
    reduce = None if w.reduce is None else w.reduce.shape
    return _layout(w.expand), w.depthwise.shape, reduce, _layout(w.project)
