"""Autograd functions around one batch normalisation: after any convolution, after a 1x1 convolution, before a pool."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.norm_backward import NormBackward
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm_op
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool_variance


class NormOptions(NamedTuple):
    """`constant`: the moments are given rather than of this batch. `activation` as in `ops.maps`."""

    activation: int
    eps: float
    constant: bool
    backend: str


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("fused layers have no second derivative; build the model with fused=False for that")


def _wide(values: Tensor | None, like: Tensor) -> Tensor | None:
    return None if values is None else values.detach().to(accumulation_dtype(like.dtype)).contiguous()


class Pointwise(torch.autograd.Function):
    """(y, moments of y) of a 1x1 convolution without bias; x is channels_last."""

    @staticmethod
    def forward(ctx: Any, backend: str, want_moments: bool, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        wide = _wide(weight, x)
        y, moments = pointwise.forward(
            x,
            wide,
            None,
            maps.IDENTITY,
            None,
            None,
            maps.IDENTITY,
            None,
            want_moments,
            device=x.device,
            backend=backend,
        )
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        refuse_second_derivative()
        x, weight = ctx.saved_tensors
        _, _, want_x, want_weight = ctx.needs_input_grad
        none = (None,) * 4
        grad_x, grad_weight, _, _ = pointwise.backward(
            maps.channels_last(grad), None, None, x, _wide(weight, x), None, None, maps.IDENTITY, *none[:2],
            want_x, want_weight, device=x.device, backend=ctx.backend,
        )  # fmt: skip
        return None, None, grad_x if want_x else None, grad_weight.to(weight.dtype) if want_weight else None


class NormActivation(torch.autograd.Function):
    """``act(BN(y))`` from the moments of y, or constant ones."""

    @staticmethod
    def forward(
        ctx: Any, options: NormOptions, y: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        affine = batch_norm.affine(moments, _wide(weight, y), _wide(bias, y), options.eps, backend=options.backend)
        ctx.save_for_backward(y, moments, affine, weight, bias)
        ctx.options = options
        h: Tensor = batch_norm_op.apply(y, affine, options.activation, None, device=y.device, backend=options.backend)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative()
        y, moments, affine, weight, bias = ctx.saved_tensors
        options: NormOptions = ctx.options
        where: dict[str, Any] = {"device": y.device, "backend": options.backend}
        norm = NormBackward(
            moments, affine, options.eps, y.numel() // max(y.shape[1], 1), options.constant, options.backend
        )
        grad = maps.channels_last(grad)
        sums = batch_norm_op.sums(grad, y, affine, moments[0], options.activation, **where)
        coefficients, gradients = norm(sums)
        dy = batch_norm_op.backward(grad, y, affine, coefficients, options.activation, **where)
        return None, dy, None, *_in_dtype_of((weight, bias), gradients)


class NormPool(torch.autograd.Function):
    """(global average pool, per-sample variance) of ``act(BN(y))``, which is never stored. The variance is a constant."""

    @staticmethod
    def forward(
        ctx: Any, options: NormOptions, y: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        affine = batch_norm.affine(moments, _wide(weight, y), _wide(bias, y), options.eps, backend=options.backend)
        ctx.save_for_backward(y, moments, affine, weight, bias)
        ctx.options = options
        pooled, variance = pool_variance.forward(
            y, affine, options.activation, True, device=y.device, backend=options.backend
        )
        ctx.mark_non_differentiable(variance)
        return pooled, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        refuse_second_derivative()
        y, moments, affine, weight, bias = ctx.saved_tensors
        options: NormOptions = ctx.options
        where: dict[str, Any] = {"device": y.device, "backend": options.backend}
        norm = NormBackward(
            moments, affine, options.eps, y.numel() // max(y.shape[1], 1), options.constant, options.backend
        )
        du, sums = pool_variance.backward(grad.contiguous(), y, affine, moments[0], options.activation, **where)
        coefficients, gradients = norm(sums)
        dy = batch_norm_op.backward(du, y, affine, coefficients, maps.IDENTITY, **where)
        return None, dy, None, *_in_dtype_of((weight, bias), gradients)


def _in_dtype_of(parameters: tuple[Tensor | None, ...], gradients: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if p is None else g.to(p.dtype) for p, g in zip(parameters, gradients.unbind(), strict=True))
