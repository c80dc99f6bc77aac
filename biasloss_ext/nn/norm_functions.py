"""Autograd functions for the last batch normalization of a network, between a 1x1 convolution and a pool."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.nn.batch_norm import Norm, in_dtype
from biasloss_ext.nn.prepared_weights import prepared
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool_variance


class NormOptions(NamedTuple):
    """`activation` is a number of `maps.Activation`."""

    activation: int
    norm: Norm
    backend: str


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("fused layers have no second derivative; build the model with fused=False to get one")


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off for the device of x, at no cost if it is off already."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


class Pointwise(torch.autograd.Function):
    """(y, statistics of y) of a 1x1 convolution without bias; x is channels_last.

    The parameters of the following normalization serve only the statistics, which are not differentiable. If ``norm`` is
    frozen, the statistics have no elements.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        norm: Norm,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        narrow = prepared(weight, x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.narrow = narrow  # not saved, see `chain_function.ChainFunction`
        ctx.backend = backend
        dtype = accumulation_dtype(x.dtype)
        operand = in_dtype(weight, dtype) if narrow is None else narrow
        finish = {} if norm.frozen else norm.finish(in_dtype(norm_weight, dtype), in_dtype(norm_bias, dtype))
        y, statistics = pointwise.forward(x, operand, want_statistics=not norm.frozen, backend=backend, **finish)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        refuse_second_derivative()
        x, weight = ctx.saved_tensors
        narrow = ctx.narrow
        _, _, want_x, want_weight, _, _ = ctx.needs_input_grad
        if grad is None:
            return (None,) * 6
        grad_x, grad_weight, *_ = pointwise.backward(
            maps.channels_last(grad),
            x,
            in_dtype(weight, accumulation_dtype(x.dtype)) if narrow is None else narrow,
            want_x=want_x,
            want_weight=want_weight,
            backend=ctx.backend,
        )
        of_weight = maps.in_layout_of(weight, grad_weight) if want_weight else None
        return None, None, grad_x if want_x else None, of_weight, None, None


class NormPool(torch.autograd.Function):
    """(global average pool, per-sample variance) of ``act(BN(y))``, which is never stored. The variance is a constant."""

    @staticmethod
    def forward(
        ctx: Any, options: NormOptions, y: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y, statistics, weight, bias)
        ctx.options = options
        pooled, variance = pool_variance.forward(
            y, affine=statistics[2:], activation=options.activation, want_variance=True, backend=options.backend
        )
        ctx.mark_non_differentiable(variance)
        ctx.set_materialize_grads(False)
        return pooled, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        refuse_second_derivative()
        y, statistics, weight, bias = ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        options: NormOptions = ctx.options
        affine, backend = statistics[2:], options.backend
        du, coefficients = pool_variance.backward(
            grad.contiguous(),
            y,
            affine=affine,
            moments=statistics[:2],
            activation=options.activation,
            backend=backend,
            **options.norm.back,
        )
        dy = batch_norm.backward(du, y, affine, coefficients, backend=backend)
        return None, dy, None, *_of_parameters(coefficients, weight, bias)


def _of_parameters(
    coefficients: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a normalization's parameters."""
    of_weight, of_bias = coefficients[4:].unbind()
    pairs = ((weight, of_weight), (bias, of_bias))
    # A list: Dynamo of torch 2.15 does not trace a generator here.
    laid_out = [None if parameter is None else maps.in_layout_of(parameter, grad) for parameter, grad in pairs]
    return laid_out[0], laid_out[1]
