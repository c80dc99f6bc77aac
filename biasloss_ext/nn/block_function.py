"""Forward and backward of a whole depthwise-separable block, put together from the ops.

    y1 = expand(x)       h1 = act1(BN1(y1))       y2 = depthwise(h1)       h2 = act2(BN2(y2))
    z = h2 * gate(mean of h2)       y3 = project(z)       out = BN3(y3) + residual

Every normalization, activation and gate is applied while the next op loads its input. The op that writes a map computes the
statistics of the normalization after it, and the op that computes a gradient the coefficients of the normalization before it.
Two schemes:

- *expand-free*, where `expand_depthwise` has kernels: y1 is never stored. Its moments come from the mean and the Gram matrix
  of x, since y1 is linear in x: with W the expand weight, ``mean(y1) = W mean(x)`` and
  ``var(y1)_c = w_c^T Cov(x) w_c``. In backward, with du the gradient at BN1's output and ``dy1 = a du + b (y1 - mean) + c`` the
  one at y1 (see `ops.maps`), the terms of the statistics are linear in x again:
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

from biasloss_ext.nn import block_replay
from biasloss_ext.nn.batch_norm import Norm, in_dtype
from biasloss_ext.nn.norm_functions import refuse_second_derivative, without_autocast
from biasloss_ext.nn.prepared_weights import prepared
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm
from biasloss_ext.ops.depthwise import op as depthwise
from biasloss_ext.ops.expand_depthwise import op as expand_depthwise
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool_variance
from biasloss_ext.ops.squeeze_excite import op as squeeze_excite


class Options(NamedTuple):
    """What a block does, besides its tensors. Activations are numbers of `maps.Activation`; `adds_input` makes x the residual,
    in place of a tensor of its own; `returns_statistics` is for a caller that moves the running statistics itself."""

    expand_activation: int
    depthwise_activation: int
    excite_activation: int
    gate_activation: int
    stride: int
    norms: tuple[Norm, Norm, Norm]
    adds_input: bool
    expand_free: bool
    returns_statistics: bool
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


class Narrow(NamedTuple):
    """Copies of weights in the dtype of x, where they were prepared."""

    expand: Tensor | None
    project: Tensor | None

    def within(self, w: Weights) -> Weights:
        if self.expand is not None:
            w = w._replace(expand=self.expand)
        return w if self.project is None else w._replace(project=self.project)


class Constants(NamedTuple):
    """Of the three normalizations: statistics (4, C) to be used as constants, or None for those of this batch."""

    expand: Tensor | None
    depthwise: Tensor | None
    project: Tensor | None


class Saved(NamedTuple):
    """What backward needs besides x and the parameters. `y1` of the stored scheme, `mean_x` and `weight_gram` of the other."""

    y2: Tensor
    y3: Tensor
    statistics2: Tensor
    statistics3: Tensor
    statistics1: Tensor | None = None
    y1: Tensor | None = None
    mean_x: Tensor | None = None
    weight_gram: Tensor | None = None
    pooled: Tensor | None = None
    gate: Tensor | None = None
    reduced: Tensor | None = None
    expanded: Tensor | None = None


def in_accumulation_dtype(parameters: tuple[Tensor | None, ...], dtype: torch.dtype) -> Weights:
    """The parameters in ``dtype``, a gate's 1x1 convolutions as matrices.

    They are flattened here rather than by the caller, so that autograd returns gradients in the strides of the parameters.
    """
    w = Weights._make(
        [t if t is None or (t.dtype is dtype and t.is_contiguous()) else in_dtype(t, dtype) for t in parameters]
    )
    if w.reduce is None or w.excite is None or w.reduce.dim() == w.excite.dim() == 2:
        return w
    return w._replace(reduce=w.reduce.flatten(1), excite=w.excite.flatten(1))


class Block(torch.autograd.Function):
    """(out,), and where the options ask for them the statistics of the batch that were taken; those are not differentiable.

    The arguments end with the fields of `Constants` and of `Weights`.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, x: Tensor, residual: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        constants, parameters = Constants(*others[:3]), others[3:]
        w = in_accumulation_dtype(parameters, accumulation_dtype(x.dtype))
        narrow = Narrow(*(prepared(parameters[Weights._fields.index(name)], x.dtype) for name in Narrow._fields))
        w = narrow.within(w)
        with without_autocast(x):
            out, saved = _recorded_forward(options, constants, x, x if options.adds_input else residual, w)
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.narrow = narrow  # not saved: a checkpoint recomputes without copies, and must save as many tensors
        ctx.options = options
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        if not options.returns_statistics:
            return (out,)
        all_statistics = (saved.statistics1, saved.statistics2, saved.statistics3)
        of_batch = tuple(
            s.clone()
            for s, norm in zip(all_statistics, options.norms, strict=True)
            if s is not None and not norm.frozen
        )
        ctx.mark_non_differentiable(*of_batch)
        return (out, *of_batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative()
        x, *rest = ctx.saved_tensors
        count = len(Weights._fields)
        parameters, saved = rest[:count], Saved(*rest[count:])
        if grad is None:
            return (None,) * (6 + count)
        # Hooks on saved tensors, such as those that keep them in the host's memory, may return another layout.
        x, grad = maps.channels_last(x), maps.channels_last(grad)
        saved = saved._replace(
            y1=None if saved.y1 is None else maps.channels_last(saved.y1),
            y2=maps.channels_last(saved.y2),
            y3=maps.channels_last(saved.y3),
        )
        w = ctx.narrow.within(in_accumulation_dtype(parameters, accumulation_dtype(x.dtype)))
        same = grad if grad.dtype is x.dtype else grad.to(x.dtype)
        with without_autocast(x):
            grad_x, grads = _recorded_backward(ctx.options, same, x, w, saved)
        laid_out = [
            None if p is None or g is None else maps.in_layout_of(p, g) for p, g in zip(parameters, grads, strict=True)
        ]
        grad_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
        return None, grad_x, grad_residual, None, None, None, *laid_out


def _recorded_forward(
    options: Options, constants: Constants, x: Tensor, residual: Tensor | None, w: Weights
) -> tuple[Tensor, Saved]:
    if not block_replay.is_recorded(options, x):
        return _forward(options, constants, x, residual, w)

    def run() -> tuple[Tensor | None, ...]:
        out, saved = _forward(options, constants, x, residual, w)
        return (out, *saved)

    out, *saved = block_replay.forward(options, constants, x, residual, w, run)
    assert out is not None
    return out, Saved._make(saved)


def _recorded_backward(options: Options, grad: Tensor, x: Tensor, w: Weights, saved: Saved) -> tuple[Tensor, Weights]:
    backward = _Backward(options, grad, x, w, saved)
    if not block_replay.is_recorded(options, x):
        return backward.run()

    def run() -> tuple[Tensor | None, ...]:
        grad_x, grads = backward.run()
        return (grad_x, *grads)

    grad_x, *grads = block_replay.backward(options, grad, x, w, saved, run)
    assert grad_x is not None
    return grad_x, Weights._make(grads)


def _forward(
    options: Options, constants: Constants, x: Tensor, residual: Tensor | None, w: Weights
) -> tuple[Tensor, Saved]:
    backend = options.backend
    hidden = _hidden(options, constants, x, w)
    y2, affine2 = hidden.y2, hidden.statistics2[2:]
    activation = options.depthwise_activation
    gate: Tensor | None = None
    of_gate: tuple[Tensor | None, ...] = (None, None, None, None)
    if w.reduce is not None:
        pooled, _ = pool_variance.forward(y2, affine=affine2, activation=activation, backend=backend)
        gate, reduced, expanded = squeeze_excite.forward(
            pooled,
            w.reduce,
            w.reduce_bias,
            w.excite,
            w.excite_bias,
            activation=options.excite_activation,
            gate_activation=options.gate_activation,
            backend=backend,
        )
        of_gate = (pooled, gate, reduced, expanded)
    y3, statistics3 = pointwise.forward(
        y2,
        w.project,
        affine=affine2,
        activation=activation,
        gate=gate,
        backend=backend,
        **_finish(options.norms[2], w.project_gamma, w.project_beta),
    )
    statistics3 = statistics3 if constants.project is None else constants.project
    out = batch_norm.apply(y3, statistics3[2:], residual=residual, backend=backend)
    return out, Saved(
        y2,
        y3,
        hidden.statistics2,
        statistics3,
        hidden.statistics1,
        hidden.y1,
        hidden.mean_x,
        hidden.weight_gram,
        *of_gate,
    )


def _finish(norm: Norm, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    return {} if norm.frozen else {"want_statistics": True, **norm.finish(weight, bias)}


class _Hidden(NamedTuple):
    """The depthwise convolution's result, and what backward needs of the way there."""

    y2: Tensor
    statistics2: Tensor
    statistics1: Tensor | None = None
    y1: Tensor | None = None
    mean_x: Tensor | None = None
    weight_gram: Tensor | None = None


def _hidden(options: Options, constants: Constants, x: Tensor, w: Weights) -> _Hidden:
    backend = options.backend
    norm1, norm2, _ = options.norms
    of_depthwise: dict[str, Any] = {"stride": options.stride, "backend": backend}
    of_depthwise |= _finish(norm2, w.depthwise_gamma, w.depthwise_beta)
    statistics1 = y1 = mean_x = weight_gram = None
    if w.expand is None:
        y2, statistics2 = depthwise.forward(x, w.depthwise, **of_depthwise)
    elif options.expand_free:
        statistics1, mean_x, weight_gram = _statistics_of_expanded(options, constants.expand, x, w)
        y2, statistics2 = expand_depthwise.forward(
            x, w.expand, statistics1[2:], w.depthwise, activation=options.expand_activation, **of_depthwise
        )
    else:
        y1, statistics1 = pointwise.forward(
            x, w.expand, backend=backend, **_finish(norm1, w.expand_gamma, w.expand_beta)
        )
        statistics1 = statistics1 if constants.expand is None else constants.expand
        y2, statistics2 = depthwise.forward(
            y1, w.depthwise, affine=statistics1[2:], activation=options.expand_activation, **of_depthwise
        )
    statistics2 = statistics2 if constants.depthwise is None else constants.depthwise
    return _Hidden(y2, statistics2, statistics1, y1, mean_x, weight_gram)


def _statistics_of_expanded(
    options: Options, constants: Tensor | None, x: Tensor, w: Weights
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Statistics of y1, the point that x is centered at in backward, and the expand weight times the Gram matrix of x."""
    if constants is not None:
        return constants, constants.new_zeros(x.shape[1]), None
    assert w.expand is not None
    mean_x, gram = expand_depthwise.gram(x, backend=options.backend)
    matrix = w.expand.flatten(1)
    count = x.numel() // max(x.shape[1], 1)
    weight_gram, moments = expand_depthwise.product(x, mean_x, gram, matrix, matrix @ gram, backend=options.backend)
    finish = options.norms[0].finish(w.expand_gamma, w.expand_beta)
    return batch_norm.affine(moments, count, backend=options.backend, **finish), mean_x, weight_gram


class _Backward:
    """The backward pass, part by part, from the output to the input."""

    def __init__(self, options: Options, grad: Tensor, x: Tensor, w: Weights, saved: Saved) -> None:
        self.options, self.grad, self.x, self.w, self.saved = options, grad, x, w, saved
        self.backend = options.backend
        self.residual_grad = grad if options.adds_input else None

    def run(self) -> tuple[Tensor, Weights]:
        """The gradients of the input and of the parameters."""
        at_hidden, coefficients2, of_excite, of_project = self._project()
        grad_x, of_expand, of_depthwise = self._hidden(at_hidden, coefficients2)
        of_norm2 = coefficients2[4:].unbind()
        return grad_x, Weights._make((*of_expand, of_depthwise, *of_norm2, *of_excite, *of_project))

    def _project(
        self,
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor, tuple[Tensor | None, ...], tuple[Tensor, Tensor, Tensor]]:
        """Gradients at h2 and at its pool, coefficients of BN2, gradients of the gate's and the projection's parameters."""
        options, saved, w, grad = self.options, self.saved, self.w, self.grad
        _, norm2, norm3 = options.norms
        statistics2, statistics3 = saved.statistics2, saved.statistics3
        coefficients3 = batch_norm.coefficients(
            grad, saved.y3, statistics3[2:], statistics3[:2], backend=self.backend, **norm3.back
        )
        affine2, moments2 = statistics2[2:], statistics2[:2]
        dh2, d_project, d_gate, sums, coefficients2 = pointwise.backward(
            grad,
            saved.y2,
            w.project,
            y=saved.y3,
            y_coefficients=coefficients3,
            affine=affine2,
            moments=moments2,
            activation=options.depthwise_activation,
            gate=saved.gate,
            backend=self.backend,
            **norm2.back,
        )
        of_project = (d_project, *coefficients3[4:].unbind())
        if saved.gate is None:
            return (dh2, None), coefficients2, (None,) * 4, of_project
        pool_grad, *of_excite, coefficients2 = squeeze_excite.backward(
            d_gate,
            saved.pooled,
            saved.reduced,
            saved.expanded,
            w.reduce,
            w.excite,
            activation=options.excite_activation,
            gate_activation=options.gate_activation,
            sums=sums,
            affine=affine2,
            moments=moments2,
            positions=saved.y2.shape[2] * saved.y2.shape[3],
            backend=self.backend,
            **norm2.back,
        )
        return (dh2, pool_grad), coefficients2, tuple(of_excite), of_project

    def _hidden(
        self, at_hidden: tuple[Tensor, Tensor | None], coefficients2: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], Tensor]:
        """Gradients of the input, of the expansion's and of the depthwise convolution's parameters."""
        options, saved, w = self.options, self.saved, self.w
        dh2, pool_grad = at_hidden
        after: dict[str, Any] = {"grad": dh2, "pool_grad": pool_grad, "stride": options.stride, "backend": self.backend}
        after["y_activation"] = options.depthwise_activation
        if options.expand_free and w.expand is not None:
            return self._expand_free(after, coefficients2)
        after.update(y=saved.y2, y_affine=saved.statistics2[2:], y_coefficients=coefficients2)
        if w.expand is None:
            grad_x, d_depthwise, _ = depthwise.backward(self.x, w.depthwise, residual_grad=self.residual_grad, **after)
            return grad_x, (None, None, None), d_depthwise
        assert saved.y1 is not None and saved.statistics1 is not None
        norm1 = options.norms[0]
        du1, d_depthwise, coefficients1 = depthwise.backward(
            saved.y1,
            w.depthwise,
            affine=saved.statistics1[2:],
            moments=saved.statistics1[:2],
            activation=options.expand_activation,
            **after,
            **norm1.back,
        )
        # The gradient at y1 sums to zero where the statistics are the batch's own.
        grad_x, d_expand, _, _, _ = pointwise.backward(
            du1,
            self.x,
            w.expand,
            y=saved.y1,
            y_coefficients=coefficients1,
            residual_grad=self.residual_grad,
            any_origin=not norm1.frozen,
            backend=self.backend,
        )
        return grad_x, (d_expand, *coefficients1[4:].unbind()), d_depthwise

    def _expand_free(
        self, after: dict[str, Any], coefficients2: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        saved, w, x = self.saved, self.w, self.x
        assert w.expand is not None and saved.mean_x is not None and saved.statistics1 is not None
        grad_x, d_expand, d_depthwise, coefficients = expand_depthwise.backward(
            x,
            saved.mean_x,
            w.expand,
            saved.statistics1[2:],
            saved.statistics1[:2],
            w.depthwise,
            saved.y2,
            saved.statistics2[2:],
            coefficients2,
            activation=self.options.expand_activation,
            **after,
            **self.options.norms[0].back,
        )
        if self.residual_grad is not None:
            grad_x += self.residual_grad
        a, b, c, _, *of_norm = coefficients.unbind()
        matrix = w.expand.flatten(1)
        d_expand = a[:, None] * d_expand.flatten(1)
        if saved.weight_gram is not None:  # else constant statistics: b and c are zero
            d_expand += b[:, None] * saved.weight_gram
            mean = saved.mean_x
            grad_x, _ = pointwise.forward(
                x if x.dtype == grad_x.dtype else x.to(grad_x.dtype),
                ((matrix.T * b) @ matrix)[:, :, None, None],
                affine=torch.stack((torch.ones_like(mean), -mean)),
                bias=c @ matrix,
                residual=grad_x,
                backend=self.backend,
            )
        return grad_x.to(x.dtype), (d_expand, of_norm[0], of_norm[1]), d_depthwise
