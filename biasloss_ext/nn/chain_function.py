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

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biasloss_ext.nn import chain_replay, synchronized
from biasloss_ext.nn.batch_norm import Norm, in_dtype
from biasloss_ext.nn.norm_functions import refuse_second_derivative, without_autocast
from biasloss_ext.nn.prepared_weights import prepared
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm
from biasloss_ext.ops.depthwise import dilated
from biasloss_ext.ops.depthwise import op as depthwise
from biasloss_ext.ops.expand_depthwise import op as expand_depthwise
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool_variance
from biasloss_ext.ops.squeeze_excite import op as squeeze_excite

NO_CONVOLUTION, POINTWISE, DEPTHWISE = range(3)  # kinds of steps; the first may only begin a chain


class StepOptions(NamedTuple):
    """What a step does, besides its tensors. Activations are numbers of `maps.Activation`."""

    kind: int
    stride: int
    same_padding: bool  # of a depthwise convolution: TensorFlow's
    dilation: int
    activation: int
    excite_activation: int
    gate_activation: int
    norm: Norm
    is_recomputed: bool  # a 1x1 convolution whose result the depthwise one after it recomputes


class Options(NamedTuple):
    """What a chain does.

    Attributes:
        steps: in order.
        adds_input: whether x is the residual, in place of a tensor of its own.
        returns_statistics: for a caller that moves running statistics itself.
        backend: of every op.
        description: by `chain_replay.description`, of options that serve many calls.
    """

    steps: tuple[StepOptions, ...]
    adds_input: bool
    returns_statistics: bool
    backend: str
    description: Hashable = None


class Weights(NamedTuple):
    """The parameters of a step; None where it has no such part."""

    convolution: Tensor | None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    reduce: Tensor | None = None
    reduce_bias: Tensor | None = None
    excite: Tensor | None = None
    excite_bias: Tensor | None = None


class Saved(NamedTuple):
    """What backward needs of a step besides its parameters. `y` is None where it is the input of the chain, or recomputed; then
    `mean_x` and `weight_gram` are given."""

    y: Tensor | None
    statistics: Tensor
    pooled: Tensor | None = None
    gate: Tensor | None = None
    reduced: Tensor | None = None
    expanded: Tensor | None = None
    mean_x: Tensor | None = None
    weight_gram: Tensor | None = None
    total: Tensor | None = None  # values per channel of a normalization over several processes


WEIGHTS, SAVED = len(Weights._fields), len(Saved._fields)


def by_step(kind: Any, tensors: Any) -> tuple[Any, ...]:
    """Group a flat sequence of tensors into one ``kind`` per step."""
    width = len(kind._fields)
    return tuple([kind._make(tensors[start : start + width]) for start in range(0, len(tensors), width)])


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
        out, saved = _Forward(options, constants, x, _weights(weights)).run(residual)
        return (out, *[tensor for step in saved for tensor in step])

    if not chain_replay.is_recorded(options, x):
        return run()
    return chain_replay.forward(options, constants, x, residual, weights, run)


def _backward(
    options: Options, grad: Tensor, x: Tensor, weights: _Tensors, saved: _Tensors
) -> tuple[Tensor | None, ...]:
    """The gradients of the input and of the fields of `Weights`."""

    def run() -> tuple[Tensor | None, ...]:
        grad_x, grads = _Backward(options, grad, x, _weights(weights), by_step(Saved, saved)).run()
        return (grad_x, *[tensor for step in grads for tensor in step])

    if not chain_replay.is_recorded(options, x):
        return run()
    return chain_replay.backward(options, grad, x, weights, saved, run)


class _Loaded(NamedTuple):
    """A map, and what is applied to it while it is loaded."""

    x: Tensor
    affine: Tensor | None = None
    activation: int = maps.IDENTITY
    gate: Tensor | None = None


class _Forward:
    """The forward pass, step by step."""

    def __init__(
        self, options: Options, constants: Sequence[Tensor | None], x: Tensor, weights: tuple[Weights, ...]
    ) -> None:
        self.options, self.constants, self.x, self.weights = options, constants, x, weights
        self.backend = options.backend

    def run(self, residual: Tensor | None) -> tuple[Tensor, tuple[Saved, ...]]:
        loaded, saved = _Loaded(self.x), []
        for index, step in enumerate(self.options.steps):
            if step.is_recomputed:
                saved.append(self._moments_of_expanded(index))
                continue
            y, statistics = self._convolved(index, loaded, saved)
            constants, total = self.constants[index], None
            if constants is not None:
                statistics = constants
            elif step.norm.sync is not None:
                _, gamma, beta, *_ = self.weights[index]
                statistics, total = synchronized.statistics(step.norm, y, statistics, gamma, beta, backend=self.backend)
            of_gate = self._gate(index, y, statistics[2:])
            kept = None if step.kind == NO_CONVOLUTION else y
            saved.append(Saved(kept, statistics, *of_gate)._replace(total=total))
            loaded = _Loaded(y, statistics[2:], step.activation, of_gate[1])
        out: Tensor = batch_norm.apply(
            loaded.x, loaded.affine, activation=loaded.activation, residual=residual, backend=self.backend
        )
        return out, tuple(saved)

    def _finish(self, index: int) -> dict[str, Any]:
        """The arguments by which the op that writes the map of a step computes its statistics."""
        norm, w = self.options.steps[index].norm, self.weights[index]
        if norm.frozen:
            return {}
        return {"want_statistics": True, **norm.finish(w.gamma, w.beta)}

    def _convolved(self, index: int, loaded: _Loaded, saved: list[Saved]) -> tuple[Tensor, Any]:
        step, weight = self.options.steps[index], self.weights[index].convolution
        finish, backend = self._finish(index), self.backend
        if weight is None:
            finish.pop("want_statistics", None)
            return loaded.x, batch_norm.statistics(loaded.x, **finish, backend=backend) if finish else None
        on_load: dict[str, Any] = {"affine": loaded.affine, "activation": loaded.activation, "backend": backend}
        if step.kind == POINTWISE:
            result: tuple[Tensor, Any] = pointwise.forward(loaded.x, weight, gate=loaded.gate, **on_load, **finish)
            return result
        if index > 0 and self.options.steps[index - 1].is_recomputed:
            expand, statistics = self.weights[index - 1].convolution, saved[-1].statistics
            activation = self.options.steps[index - 1].activation
            result = expand_depthwise.forward(
                self.x,
                expand,
                statistics[2:],
                weight,
                activation=activation,
                stride=step.stride,
                same_padding=step.same_padding,
                backend=backend,
                **finish,
            )
            return result
        if step.dilation > 1:
            return dilated.forward(loaded.x, weight, dilation=step.dilation, **on_load, **finish)
        geometry: dict[str, Any] = {"stride": step.stride, "same_padding": step.same_padding}
        result = depthwise.forward(loaded.x, weight, **geometry, **on_load, **finish)
        return result

    def _gate(self, index: int, y: Tensor, affine: Tensor) -> tuple[Tensor | None, ...]:
        """Pooled activations, gate, and the inputs of its two activations."""
        step, w = self.options.steps[index], self.weights[index]
        if w.reduce is None:
            return (None,) * 4
        pooled, _ = pool_variance.forward(y, affine=affine, activation=step.activation, backend=self.backend)
        gate, reduced, expanded = squeeze_excite.forward(
            pooled,
            w.reduce,
            _or_zeros(w.reduce_bias, w.reduce),
            w.excite,
            _or_zeros(w.excite_bias, w.excite),
            activation=step.excite_activation,
            gate_activation=step.gate_activation,
            backend=self.backend,
        )
        return pooled, gate, reduced, expanded

    def _moments_of_expanded(self, index: int) -> Saved:
        """Statistics of a map that is recomputed, the point that x is centered at in backward, and the weight times the Gram
        matrix of x."""
        constants, w, x = self.constants[index], self.weights[index], self.x
        if constants is not None:
            return Saved(None, constants, mean_x=constants.new_zeros(x.shape[1]))
        assert w.convolution is not None
        mean_x, gram = expand_depthwise.gram(x, backend=self.backend)
        matrix = w.convolution.flatten(1)
        count = x.numel() // max(x.shape[1], 1)
        weight_gram, moments = expand_depthwise.product(x, mean_x, gram, matrix, matrix @ gram, backend=self.backend)
        finish = self.options.steps[index].norm.finish(w.gamma, w.beta)
        statistics = batch_norm.affine(moments, count, backend=self.backend, **finish)
        return Saved(None, statistics, mean_x=mean_x, weight_gram=weight_gram)


def _or_zeros(bias: Tensor | None, weight: Tensor | None) -> Tensor | None:
    return weight.new_zeros(weight.shape[0]) if bias is None and weight is not None else bias


class _Backward:
    """The backward pass, step by step, from the output to the input.

    Between steps, `grad` is the gradient at a step's h, or at its u where the activation has been differentiated already:
    `activation` is the one that has not. `pool_grad` is what a gate's pool adds to h, `coefficients` are those of the step's
    normalization, `of_gate` the gradients of its gate's parameters.
    """

    def __init__(
        self, options: Options, grad: Tensor, x: Tensor, weights: tuple[Weights, ...], saved: tuple[Saved, ...]
    ) -> None:
        self.options, self.x, self.weights, self.saved = options, x, weights, saved
        self.backend = options.backend
        self.residual_grad = grad if options.adds_input else None
        self.grad = grad
        self.pool_grad: Tensor | None = None
        self.of_gate: tuple[Tensor | None, ...] = ()
        self.activation = options.steps[-1].activation
        self.grads: list[Weights] = []  # from the last step to the first

    def run(self) -> tuple[Tensor, tuple[Weights, ...]]:
        """The gradients of the input and of the parameters."""
        steps = self.options.steps
        index = len(steps) - 1
        statistics = self.saved[index].statistics
        run: dict[str, Any] = {"activation": self.activation, "backend": self.backend, **steps[index].norm.back}
        self._settle(index, batch_norm.coefficients(self.grad, self._map(index), statistics[2:], statistics[:2], **run))
        of_kind = (self._normalization, self._pointwise, self._depthwise)
        while index >= 0:
            if index > 0 and steps[index - 1].is_recomputed:
                self._expand_depthwise(index)
                break
            of_kind[steps[index].kind](index)
            index -= 1
        return self.grad, tuple(reversed(self.grads))

    def _map(self, index: int) -> Tensor:
        """The map that a step writes; -1 stands for the input."""
        y = self.saved[index].y if index >= 0 else None
        return self.x if y is None else y

    def _settle(self, index: int, coefficients: Tensor) -> None:
        """Keep the coefficients of a step's normalization, with the sums of all processes where it takes these."""
        norm = self.options.steps[index].norm
        if norm.sync is not None:
            coefficients = synchronized.coefficients(norm, coefficients, self.saved[index])
        self.coefficients = coefficients

    def _enter(self, convolution: Tensor | None, coefficients: Tensor) -> None:
        """Note the gradients of a step's parameters, once the step is done."""
        self.grads.append(Weights(convolution, *coefficients[4:].unbind(), *self.of_gate))
        self.of_gate, self.pool_grad = (), None

    def _on_load(self, index: int) -> dict[str, Any]:
        """What was applied to the input of a step, and the arguments for the coefficients of the normalization there."""
        if index == 0:
            return {"residual_grad": self.residual_grad}
        step, statistics = self.options.steps[index - 1], self.saved[index - 1].statistics
        found = {"affine": statistics[2:], "moments": statistics[:2], "activation": step.activation}
        return {**found, **step.norm.back}

    def _behind_norm(self, index: int) -> Tensor:
        """The gradient at the map of a step."""
        grad, y = maps.with_pool_gradient(self.grad, self.pool_grad), self._map(index)
        affine, coefficients = self.saved[index].statistics[2:], self.coefficients
        run: dict[str, Any] = {"activation": self.activation, "backend": self.backend}
        dy: Tensor = batch_norm.backward(grad, y, affine, coefficients, **run)
        return dy

    def _normalization(self, index: int) -> None:
        """Of the input itself: the first step."""
        grad = self._behind_norm(index)
        self._enter(None, self.coefficients)
        self.grad = grad if self.residual_grad is None else grad + self.residual_grad

    def _pointwise(self, index: int) -> None:
        weight, norm, coefficients = self.weights[index].convolution, self.options.steps[index].norm, self.coefficients
        options = {"backend": self.backend, **self._on_load(index)}
        grad = self.grad
        if self.activation == maps.IDENTITY and self.pool_grad is None:
            options.update(y=self._map(index), y_coefficients=coefficients)
        else:
            grad = self._behind_norm(index)
        if index == 0:
            # The gradient at y sums to zero where the statistics are the batch's own.
            options.update(any_origin=not norm.frozen and norm.sync is None)
        gate = None if index == 0 else self.saved[index - 1].gate
        x = self._map(index - 1)
        self.grad, of_weight, d_gate, sums, before = pointwise.backward(grad, x, weight, gate=gate, **options)
        self._enter(of_weight, coefficients)
        if index > 0:
            self.activation = self.options.steps[index - 1].activation
            self._settle(index - 1, before if gate is None else self._gate(index - 1, d_gate, sums))

    def _gate(self, index: int, d_gate: Tensor, sums: Tensor) -> Tensor:
        """Go through the gate of a step; returns the coefficients of its normalization."""
        step, saved, w = self.options.steps[index], self.saved[index], self.weights[index]
        y = self._map(index)
        self.pool_grad, *of_gate, coefficients = squeeze_excite.backward(
            d_gate,
            saved.pooled,
            saved.reduced,
            saved.expanded,
            w.reduce,
            w.excite,
            activation=step.excite_activation,
            gate_activation=step.gate_activation,
            sums=sums,
            affine=saved.statistics[2:],
            moments=saved.statistics[:2],
            positions=y.shape[2] * y.shape[3],
            backend=self.backend,
            **step.norm.back,
        )
        self.of_gate = tuple(of_gate)
        return coefficients  # type: ignore[no-any-return]

    def _behind_depthwise(self, index: int) -> dict[str, Any]:
        """The arguments about the convolution, and about the gradient at what it writes."""
        step = self.options.steps[index]
        dilates = step.dilation > 1
        geometry = (
            {"dilation": step.dilation} if dilates else {"stride": step.stride, "same_padding": step.same_padding}
        )
        gradient = {"grad": self.grad, "pool_grad": self.pool_grad, "y_activation": self.activation}
        return {**gradient, **geometry, "backend": self.backend}

    def _depthwise(self, index: int) -> None:
        coefficients = self.coefficients
        run = dilated.backward if self.options.steps[index].dilation > 1 else depthwise.backward
        self.grad, of_weight, before = run(
            self._map(index - 1),
            self.weights[index].convolution,  # type: ignore[arg-type]
            y=self._map(index),
            y_affine=self.saved[index].statistics[2:],
            y_coefficients=coefficients,
            **self._behind_depthwise(index),
            **self._on_load(index),
        )
        self._enter(of_weight, coefficients)
        if index > 0:
            self.activation = maps.IDENTITY
            self._settle(index - 1, before)

    def _expand_depthwise(self, index: int) -> None:
        """A depthwise convolution and the 1x1 convolution before it, whose result is recomputed: the first two steps."""
        (first, second), x, expand = self.saved[index - 1 : index + 1], self.x, self.weights[index - 1].convolution
        step = self.options.steps[index - 1]
        assert expand is not None and first.mean_x is not None
        grad_x, d_expand, d_depthwise, coefficients = expand_depthwise.backward(
            x,
            first.mean_x,
            expand,
            first.statistics[2:],
            first.statistics[:2],
            self.weights[index].convolution,
            second.y,
            second.statistics[2:],
            self.coefficients,
            activation=step.activation,
            **self._behind_depthwise(index),
            **step.norm.back,
        )
        self._enter(d_depthwise, self.coefficients)
        if self.residual_grad is not None:
            grad_x += self.residual_grad
        a, b, c, *_ = coefficients.unbind()
        matrix = expand.flatten(1)
        d_expand = a[:, None] * d_expand.flatten(1)
        if first.weight_gram is not None:  # else constant statistics: b and c are zero
            d_expand += b[:, None] * first.weight_gram
            grad_x, _ = pointwise.forward(
                x if x.dtype == grad_x.dtype else x.to(grad_x.dtype),
                ((matrix.T * b) @ matrix)[:, :, None, None],
                affine=torch.stack((torch.ones_like(first.mean_x), -first.mean_x)),
                bias=c @ matrix,
                residual=grad_x,
                backend=self.backend,
            )
        self._enter(d_expand, coefficients)
        self.grad = grad_x.to(x.dtype)
