"""Forward and backward of a chain of convolutions, each with its normalization and activation, put together from the ops.

    y_1 = conv_1(x)      h_1 = act_1(BN_1(y_1))      y_2 = conv_2(gate_1 * h_1)  ...  out = act_n(BN_n(y_n)) + residual

Every convolution is depthwise or 1x1; an inverted residual is a chain of three. Normalizations, activations and gates are applied
while the next op loads its input: no h is stored but the output. The op that writes a map computes the statistics of the
normalization after it, and the op that computes a gradient the coefficients of the normalization before it.

Saved for backward: x, every y and per-channel values. Where `expand_depthwise` has kernels, the y of a first 1x1 convolution
before a depthwise one is recomputed instead. Its moments come from the mean and the Gram matrix of x, since y is linear in x:
with W the weight, ``mean(y) = W mean(x)`` and ``var(y)_c = w_c^T Cov(x) w_c``. In backward, with du the gradient at BN's output
and ``dy = a du + b (y - mean) + c`` the one at y (see `ops.maps`), the terms of the statistics are linear in x again:
``dx = (a du) W + (x - mean(x)) (W^T diag(b) W) + c W`` and ``dW = diag(a) sum(du (x - mean(x))^T) + diag(b) W Gram(x)``; the
mean of x drops out of dW because ``a sum(du)`` and ``count * c`` cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from biasloss_ext.nn import chain_replay
from biasloss_ext.nn.batch_norm import in_dtype
from biasloss_ext.nn.chain_backward import Backward
from biasloss_ext.nn.chain_forward import Forward
from biasloss_ext.nn.chain_parts import POINTWISE, SAVED, WEIGHTS, Options, Saved, Weights, by_step
from biasloss_ext.nn.norm_functions import refuse_second_derivative, without_autocast
from biasloss_ext.nn.prepared_weights import prepared
from biasloss_ext.ops import maps
from biasloss_ext.ops.library import accumulation_dtype


class ChainFunction(torch.autograd.Function):
    """(out,), and where the options ask for them the statistics of the batch that were taken, over several processes followed by
    the number of values per channel; those are not differentiable.

    The arguments end with a tensor for each step, its statistics (4, C) to be used as constants or None for those of this batch,
    and then the fields of `Weights` of each step.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, x: Tensor, residual: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(options.steps)
        constants, parameters = others[:count], others[count:]
        narrow = [
            prepared(parameters[index * WEIGHTS], x.dtype) if step.kind == POINTWISE else None
            for index, step in enumerate(options.steps)
        ]
        weights = _operands(parameters, x.dtype, narrow)
        with without_autocast(x):
            out, *saved = _forward(options, constants, x, x if options.adds_input else residual, weights)
        assert out is not None
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.narrow = narrow  # not saved: a checkpoint recomputes without copies, and must save as many tensors
        ctx.options = options
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        if not options.returns_statistics:
            return (out,)
        returned = [s for s, step in zip(by_step(Saved, saved), options.steps, strict=True) if step.norm.is_returned]
        of_batch = [t.clone() for s in returned for t in (s.statistics, s.total) if t is not None]
        ctx.mark_non_differentiable(*of_batch)
        return (out, *of_batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative()
        options: Options = ctx.options
        x, *rest = ctx.saved_tensors
        first_saved = len(options.steps) * WEIGHTS
        parameters, saved = rest[:first_saved], rest[first_saved:]
        constants = (None,) * len(options.steps)
        if grad is None:
            return None, None, None, *constants, *[None] * first_saved
        # Hooks on saved tensors, such as those that keep them in the host's memory, may return another layout.
        x, grad = maps.channels_last(x), maps.channels_last(grad)
        # The first of the fields of `Saved` is a map.
        saved = [maps.channels_last(t) if index % SAVED == 0 and t is not None else t for index, t in enumerate(saved)]
        weights = _operands(parameters, x.dtype, ctx.narrow)
        same = grad if grad.dtype is x.dtype else grad.to(x.dtype)
        with without_autocast(x):
            grad_x, *grads = _backward(options, same, x, weights, saved)
        laid_out = [
            None if p is None or g is None else maps.in_layout_of(p, g) for p, g in zip(parameters, grads, strict=True)
        ]
        grad_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
        return None, grad_x, grad_residual, *constants, *laid_out


_Tensors = list[Tensor | None]  # fields of `Weights` or `Saved`, step by step


def _operands(parameters: Sequence[Tensor | None], dtype: torch.dtype, narrow: _Tensors) -> _Tensors:
    """The parameters in the accumulation dtype, and the weights of 1x1 convolutions as narrow copies where there are some.

    They are converted here rather than by the caller, so that autograd returns gradients in the strides of the parameters.
    """
    wide = accumulation_dtype(dtype)
    found = [t if t is None or (t.dtype is wide and t.is_contiguous()) else in_dtype(t, wide) for t in parameters]
    for index, copy in enumerate(narrow):
        if copy is not None:
            found[index * WEIGHTS] = copy
    return found


def _weights(tensors: Sequence[Tensor | None]) -> tuple[Weights, ...]:
    """By step, a gate's 1x1 convolutions as matrices."""
    return tuple([w if w.reduce is None else _as_matrices(w) for w in by_step(Weights, tensors)])


def _as_matrices(w: Weights) -> Weights:
    assert w.reduce is not None and w.excite is not None
    return w._replace(reduce=w.reduce.flatten(1), excite=w.excite.flatten(1))


def _forward(
    options: Options, constants: Sequence[Tensor | None], x: Tensor, residual: Tensor | None, weights: _Tensors
) -> tuple[Tensor | None, ...]:
    """The output, and the fields of `Saved`."""

    def run() -> tuple[Tensor | None, ...]:
        out, saved = Forward(options, constants, x, _weights(weights)).run(residual)
        return (out, *[tensor for step in saved for tensor in step])

    if not chain_replay.is_recorded(options, x):
        return run()
    return chain_replay.forward(options, constants, x, residual, weights, run)


def _backward(
    options: Options, grad: Tensor, x: Tensor, weights: _Tensors, saved: _Tensors
) -> tuple[Tensor | None, ...]:
    """The gradients of the input and of the fields of `Weights`."""

    def run() -> tuple[Tensor | None, ...]:
        grad_x, grads = Backward(options, grad, x, _weights(weights), by_step(Saved, saved)).run()
        return (grad_x, *[tensor for step in grads for tensor in step])

    if not chain_replay.is_recorded(options, x):
        return run()
    return chain_replay.backward(options, grad, x, weights, saved, run)
