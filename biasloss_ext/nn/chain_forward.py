"""The forward pass of a chain, put together from the ops; see `chain_function`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from biasloss_ext.nn import synchronized
from biasloss_ext.nn.chain_parts import NO_CONVOLUTION, POINTWISE, Options, Saved, Weights
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op as batch_norm
from biasloss_ext.ops.depthwise import dilated
from biasloss_ext.ops.depthwise import op as depthwise
from biasloss_ext.ops.expand_depthwise import op as expand_depthwise
from biasloss_ext.ops.pointwise import op as pointwise
from biasloss_ext.ops.pool_variance import op as pool_variance
from biasloss_ext.ops.squeeze_excite import op as squeeze_excite


class _Loaded(NamedTuple):
    """A map, and what is applied to it while it is loaded."""

    x: Tensor
    affine: Tensor | None = None
    activation: int = maps.IDENTITY
    gate: Tensor | None = None


class Forward:
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
