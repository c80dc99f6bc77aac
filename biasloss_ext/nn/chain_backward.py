"""The backward pass of a chain, put together from the ops; see `chain_function`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext.nn import synchronized
from biasloss_ext.nn.chain_parts import Options, Saved, Weights
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm
from biasloss_ext.ops.depthwise import dilated
from biasloss_ext.ops.depthwise import op as depthwise
from biasloss_ext.ops.expand_depthwise import op as expand_depthwise
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.squeeze_excite import op as squeeze_excite


class Backward:
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
        """The arguments for what was applied to the input of a step, and for the coefficients of the normalization there."""
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
        gradient = {"grad": self.grad, "pool_grad": self.pool_grad, "y_activation": self.activation}
        return {**gradient, "stride": step.stride, "same_padding": step.same_padding, "backend": self.backend}

    def _depthwise(self, index: int) -> None:
        x, weight, coefficients = self._map(index - 1), self.weights[index].convolution, self.coefficients
        dilation, on_load = self.options.steps[index].dilation, self._on_load(index)
        assert weight is not None
        if dilation > 1:
            grad = self._behind_norm(index)
            found = dilated.backward(x, weight, dilation=dilation, grad=grad, backend=self.backend, **on_load)
        else:
            found = depthwise.backward(
                x,
                weight,
                y=self._map(index),
                y_affine=self.saved[index].statistics[2:],
                y_coefficients=coefficients,
                **self._behind_depthwise(index),
                **on_load,
            )
        self.grad, of_weight, before = found
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
