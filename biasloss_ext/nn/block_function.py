"""Forward and backward of a whole depthwise-separable block, put together from the ops.

    y1 = expand(x)       h1 = act1(BN1(y1))       y2 = depthwise(h1)       h2 = act2(BN2(y2))
    z = h2 * gate(mean of h2)       y3 = project(z)       out = BN3(y3) + residual

Every normalisation, activation and gate is applied while the next op loads its input; the moments of the next normalisation
come out of the op that writes the map. Two schemes:

- *expand-free*, where `expand_depthwise` has kernels: y1 is never stored. Its moments come from the mean and the Gram matrix
  of x, since y1 is linear in x: with W the expand weight, ``mean(y1) = W mean(x)`` and
  ``var(y1)_c = w_c^T Cov(x) w_c``. In backward, with du the gradient at BN1's output and ``dy1 = a du + b (y1 - mean) + c`` the
  one at y1 (see `ops.maps`), what depends on the statistics is linear in x again:
  ``dx = (a du) W + (x - mean(x)) (W^T diag(b) W) + c W`` and
  ``dW = diag(a) sum(du (x - mean(x))^T) + diag(b) W Gram(x)``; the mean of x drops out of dW because ``a sum(du)`` and
  ``count * c`` cancel.
- *stored*: y1 is written once, and read by the depthwise op.

Saved for backward: x, y2, y3 (y1 in the stored scheme) and per-channel values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.norm_backward import NormBackward
from biasloss_ext.nn.norm_functions import refuse_second_derivative
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm_op
from biasloss_ext.ops.depthwise import op as depthwise
from biasloss_ext.ops.expand_depthwise import op as expand_depthwise
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool_variance
from biasloss_ext.ops.squeeze_excite import op as squeeze_excite


class Options(NamedTuple):
    """What a block does, besides its tensors. The names of `ops.maps` stand for activations; `adds_input` makes x the
    residual, in place of a tensor of its own."""

    expand_activation: int
    depthwise_activation: int
    excite_activation: int
    gate_activation: int
    stride: int
    eps: tuple[float, float, float]
    adds_input: bool
    expand_free: bool
    backend: str


class Weights(NamedTuple):
    """The parameters of a block; None where it has no such part."""

    expand: Tensor | None
    expand_gamma: Tensor | None
    expand_beta: Tensor | None
    depthwise: Tensor
    depthwise_gamma: Tensor | None
    depthwise_beta: Tensor | None
    reduce: Tensor | None
    reduce_bias: Tensor | None
    excite: Tensor | None
    excite_bias: Tensor | None
    project: Tensor
    project_gamma: Tensor | None
    project_beta: Tensor | None


class Statistics(NamedTuple):
    """Of the three normalisations: moments (2, C) to be used as constants, or None for those of this batch."""

    expand: Tensor | None
    depthwise: Tensor | None
    project: Tensor | None


def in_accumulation_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    return Weights._make(None if t is None else t.detach().to(dtype).contiguous() for t in weights)


class Block(torch.autograd.Function):
    """(out, moments of y1, y2, y3); the moments are not differentiable.

    The arguments end with the fields of `Statistics` and of `Weights`.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, x: Tensor, residual: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        given, parameters = Statistics(*others[:3]), others[3:]
        with torch.autocast(x.device.type, enabled=False):
            w = in_accumulation_dtype(Weights(*parameters), accumulation_dtype(x.dtype))  # type: ignore[arg-type]
            outputs = _forward(options, given, x, x if options.adds_input else residual, w)
        out, moments, saved = outputs
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.options, ctx.frozen = options, tuple(m is not None for m in given)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(*(m for m in moments if m is not None))
        return out, *moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        refuse_second_derivative()
        x, *rest = ctx.saved_tensors
        count = len(Weights._fields)
        parameters, saved = rest[:count], Saved(*rest[count:])
        grad = maps.channels_last(grad)
        with torch.autocast(x.device.type, enabled=False):
            w = in_accumulation_dtype(Weights(*parameters), accumulation_dtype(x.dtype))
            grad_x, grads = _backward(ctx.options, ctx.frozen, grad.to(x.dtype), x, w, saved)
        in_their_dtype = (
            None if p is None or g is None else g.reshape(p.shape).to(p.dtype)
            for p, g in zip(parameters, grads, strict=True)
        )
        grad_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
        return None, grad_x, grad_residual, None, None, None, *in_their_dtype


class Saved(NamedTuple):
    """What backward needs besides x and the parameters. `y1` of the stored scheme, `mean_x` and `weight_gram` of the other."""

    y1: Tensor | None
    y2: Tensor
    y3: Tensor
    moments1: Tensor | None
    moments2: Tensor
    moments3: Tensor
    affine1: Tensor | None
    affine2: Tensor
    affine3: Tensor
    mean_x: Tensor | None
    weight_gram: Tensor | None
    pooled: Tensor | None
    gate: Tensor | None
    reduced: Tensor | None
    expanded: Tensor | None


def _forward(
    options: Options, given: Statistics, x: Tensor, residual: Tensor | None, w: Weights
) -> tuple[Tensor, tuple[Tensor | None, Tensor, Tensor], Saved]:
    where: dict[str, Any] = {"device": x.device, "backend": options.backend}
    y1 = moments1 = affine1 = mean_x = weight_gram = None
    want_moments2 = given.depthwise is None
    if w.expand is None:
        y2, moments2 = depthwise.forward(x, w.depthwise, None, maps.IDENTITY, options.stride, want_moments2, **where)
    elif options.expand_free:
        moments1, mean_x, weight_gram = _moments_of_expanded(given.expand, x, w.expand, where)
        affine1 = batch_norm.affine(moments1, w.expand_gamma, w.expand_beta, options.eps[0], backend=options.backend)
        y2, moments2 = expand_depthwise.forward(
            x, w.expand, affine1, options.expand_activation, w.depthwise, options.stride, want_moments2, **where
        )
    else:
        y1, moments1 = _project(x, w.expand, None, maps.IDENTITY, None, given.expand is None, where)
        moments1 = moments1 if given.expand is None else given.expand
        affine1 = batch_norm.affine(moments1, w.expand_gamma, w.expand_beta, options.eps[0], backend=options.backend)
        y2, moments2 = depthwise.forward(
            y1, w.depthwise, affine1, options.expand_activation, options.stride, want_moments2, **where
        )
    moments2 = moments2 if given.depthwise is None else given.depthwise
    affine2 = batch_norm.affine(moments2, w.depthwise_gamma, w.depthwise_beta, options.eps[1], backend=options.backend)
    activation = options.depthwise_activation
    pooled = gate = reduced = expanded = None
    if w.reduce is not None:
        pooled, _ = pool_variance.forward(y2, affine2, activation, False, **where)
        gate, reduced, expanded = squeeze_excite.forward(
            pooled,
            w.reduce,
            w.reduce_bias,
            w.excite,
            w.excite_bias,
            options.excite_activation,
            options.gate_activation,
            **where,
        )
    y3, moments3 = _project(y2, w.project, affine2, activation, gate, given.project is None, where)
    moments3 = moments3 if given.project is None else given.project
    affine3 = batch_norm.affine(moments3, w.project_gamma, w.project_beta, options.eps[2], backend=options.backend)
    out = batch_norm_op.apply(y3, affine3, maps.IDENTITY, residual, **where)
    saved = Saved(
        y1, y2, y3, moments1, moments2, moments3, affine1, affine2, affine3, mean_x, weight_gram,
        pooled, gate, reduced, expanded,
    )  # fmt: skip
    return out, (moments1, moments2, moments3), saved


def _project(
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    activation: int,
    gate: Tensor | None,
    want_moments: bool,
    where: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor] = pointwise.forward(
        x, weight, affine, activation, gate, None, maps.IDENTITY, None, want_moments, **where
    )
    return outputs


def _moments_of_expanded(
    given: Tensor | None, x: Tensor, weight: Tensor, where: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Moments of y1, the point that x is centered at in backward, and the expand weight times the Gram matrix of x."""
    if given is not None:
        return given, given.new_zeros(x.shape[1]), None
    mean_x, gram = expand_depthwise.gram(x, **where)
    matrix = weight.flatten(1)
    weight_gram = matrix @ gram
    count = max(x.numel() // x.shape[1], 1)
    # A rounding of the mean would shift all of a channel alike, which sums over the map do not average out.
    mean = (matrix.double() @ mean_x.double()).to(matrix.dtype)
    return torch.stack((mean, (weight_gram * matrix).sum(1) / count)), mean_x, weight_gram


def _backward(
    options: Options, frozen: tuple[bool, bool, bool], grad: Tensor, x: Tensor, w: Weights, saved: Saved
) -> tuple[Tensor, Weights]:
    where: dict[str, Any] = {"device": x.device, "backend": options.backend}
    rows_in, rows_out = x.numel() // x.shape[1], grad.numel() // max(grad.shape[1], 1)
    norms = [
        NormBackward(moments, affine, eps, rows, constant, options.backend)
        for moments, affine, eps, rows, constant in (
            (saved.moments3, saved.affine3, options.eps[2], rows_out, frozen[2]),
            (saved.moments2, saved.affine2, options.eps[1], rows_out, frozen[1]),
            (saved.moments1, saved.affine1, options.eps[0], rows_in, frozen[0]),
        )
        if moments is not None and affine is not None
    ]
    sums3 = batch_norm_op.sums(grad, saved.y3, saved.affine3, saved.moments3[0], maps.IDENTITY, **where)
    coefficients3, d_project_norm = norms[0](sums3)
    dh2, d_project, d_gate, sample_sums = pointwise.backward(
        grad,
        saved.y3,
        coefficients3,
        saved.y2,
        w.project,
        saved.affine2,
        saved.moments2[0],
        options.depthwise_activation,
        saved.gate,
        None,
        True,
        True,
        **where,
    )
    pool_grad: Tensor | None = None
    d_excite: tuple[Tensor | None, ...] = (None,) * 4
    if saved.gate is not None:
        pool_grad, *d_excite_list = squeeze_excite.backward(
            d_gate,
            saved.pooled,
            saved.reduced,
            saved.expanded,
            w.reduce,
            w.excite,
            options.excite_activation,
            options.gate_activation,
            **where,
        )
        d_excite = tuple(d_excite_list)
    sums2 = _sums_over_samples(sample_sums, pool_grad, saved.y2.shape[2] * saved.y2.shape[3])
    coefficients2, d_depthwise_norm = norms[1](sums2)
    behind = (
        dh2,
        pool_grad,
        saved.y2,
        saved.affine2,
        coefficients2,
        options.depthwise_activation,
    )
    d_expand: Tensor | None = None
    d_expand_norm: Tensor | None = None
    residual_grad = grad if options.adds_input else None
    if w.expand is None:
        grad_x, d_depthwise, _ = depthwise.backward(
            *behind, x, w.depthwise, None, None, maps.IDENTITY, options.stride, True, True, **where
        )
        grad_x = grad_x if residual_grad is None else grad_x.add_(residual_grad)
    elif options.expand_free:
        grad_x, d_expand, d_depthwise, d_expand_norm = _backward_expand_free(
            options, behind, norms[2], x, w, saved, residual_grad, where
        )
    else:
        assert saved.y1 is not None and saved.moments1 is not None
        du1, d_depthwise, sums1 = depthwise.backward(
            *behind,
            saved.y1,
            w.depthwise,
            saved.affine1,
            saved.moments1[0],
            options.expand_activation,
            options.stride,
            True,
            True,
            **where,
        )
        coefficients1, d_expand_norm = norms[2](sums1)
        # The gradient at y1 sums to zero where the statistics are the batch's own, so that x may be taken from any origin:
        # from one near its mean, what rounding leaves of that sum is not multiplied by the mean.
        origin = None if frozen[0] else _shift_by(x[:1].mean((0, 2, 3), dtype=w.expand.dtype))
        grad_x, d_expand, _, _ = pointwise.backward(
            du1,
            saved.y1,
            coefficients1,
            x,
            w.expand,
            origin,
            None,
            maps.IDENTITY,
            None,
            residual_grad,
            True,
            True,
            **where,
        )
    of_norms = [(None, None) if d is None else d.unbind() for d in (d_expand_norm, d_depthwise_norm, d_project_norm)]
    in_order = (d_expand, *of_norms[0], d_depthwise, *of_norms[1], *d_excite, d_project, *of_norms[2])
    return grad_x, Weights._make(in_order)


def _shift_by(mean: Tensor) -> Tensor:
    """The affine that takes the mean off."""
    return torch.stack((torch.ones_like(mean), -mean))


def _sums_over_samples(sample_sums: Tensor, pool_grad: Tensor | None, positions: int) -> Tensor:
    """The sums of BN2 from those of the project step, completed by what the pool of the gate adds to every position."""
    if pool_grad is None:
        return sample_sums[0::2].sum(1)
    shared = pool_grad / positions
    return (sample_sums[0::2] + shared * sample_sums[1::2]).sum(1)


def _backward_expand_free(
    options: Options,
    behind: tuple[Any, ...],
    norm: NormBackward,
    x: Tensor,
    w: Weights,
    saved: Saved,
    residual_grad: Tensor | None,
    where: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert w.expand is not None and saved.mean_x is not None and saved.moments1 is not None
    grad_x, d_expand, d_depthwise, sums = expand_depthwise.backward(
        *behind,
        x,
        saved.mean_x,
        w.expand,
        saved.affine1,
        saved.moments1[0],
        options.expand_activation,
        w.depthwise,
        options.stride,
        **where,
    )
    if residual_grad is not None:
        grad_x += residual_grad
    coefficients, d_norm = norm(sums)
    a, b, c, _ = coefficients
    matrix = w.expand.flatten(1)
    d_expand = a[:, None] * d_expand.flatten(1)
    if saved.weight_gram is None:  # constant statistics: b and c are zero
        return grad_x.to(x.dtype), d_expand, d_depthwise, d_norm
    d_expand += b[:, None] * saved.weight_gram
    through_statistics = (matrix.T * b) @ matrix
    wide = x if x.dtype == grad_x.dtype else x.to(grad_x.dtype)
    grad_x, _ = pointwise.forward(
        wide,
        through_statistics[:, :, None, None],
        _shift_by(saved.mean_x),
        maps.IDENTITY,
        None,
        c @ matrix,
        maps.IDENTITY,
        grad_x,
        False,
        **where,
    )
    return grad_x.to(x.dtype), d_expand, d_depthwise, d_norm
