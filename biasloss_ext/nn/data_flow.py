"""The data flow of a block, read backwards from its output, layer by layer.

`torch.fx` follows a block's own ``forward`` with its layers as they are: what is found is what is computed, whoever wrote the
block and whatever its classes are called.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from biasloss_ext.nn.activations import FORMS_OF_GELU
from biasloss_ext.ops import maps


class Unfamiliar(Exception):
    """Carries the sentence that says what about a block has no fused kernels."""


class Layer(NamedTuple):
    """Convolution, normalization and activation."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    activation: int


class Attention(NamedTuple):
    """The two layers of a squeeze-and-excitation, and their activations."""

    reduce: nn.Conv2d | nn.Linear
    excite: nn.Conv2d | nn.Linear
    activation: int
    gate_activation: int


_OF_FUNCTIONS: dict[Any, int] = {
    F.relu: maps.RELU,
    torch.relu: maps.RELU,
    F.relu6: maps.RELU6,
    F.hardswish: maps.HARDSWISH,
    F.silu: maps.SILU,
    F.gelu: maps.GELU,
    F.hardsigmoid: maps.HARDSIGMOID,
    F.sigmoid: maps.SIGMOID,
    torch.sigmoid: maps.SIGMOID,
    "relu": maps.RELU,
    "relu_": maps.RELU,
    "sigmoid": maps.SIGMOID,
    "sigmoid_": maps.SIGMOID,
}
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
_POOLS = (F.adaptive_avg_pool2d, nn.functional.adaptive_avg_pool2d)
_MEANS = (torch.mean, "mean")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not module._modules or isinstance(module, _BatchNorm)

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Without the hooks of modules that are looked into, which expect tensors."""
        name = self.path_of_module(module)
        if self.is_leaf_module(module, name):
            return self.create_proxy("call_module", name, arguments, options)
        return module.forward(*arguments, **options)


class Flow:
    """The computation of ``block``, as a graph of its innermost layers.

    Raises:
        Unfamiliar: the block cannot be traced, or takes more than one tensor.
    """

    def __init__(self, block: nn.Module, activation_of: Callable[[nn.Module], int | None]) -> None:
        try:
            self.graph = _Tracer().trace(block)
        except Exception as error:  # whatever the block's own code raises for a stand-in of a tensor
            raise Unfamiliar(f"its data flow cannot be traced: {str(error).splitlines()[0]}") from error
        self._modules = dict(block.named_modules(remove_duplicate=False))
        self._activation_of = activation_of
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise Unfamiliar(f"it takes {len(inputs)} inputs")
        self.input: fx.Node = inputs[0]
        (self.output,) = (node for node in self.graph.nodes if node.op == "output")
        self._read: set[fx.Node] = {self.input, self.output}

    def result(self) -> fx.Node:
        return self._node(self.output.args[0])

    def check_all_read(self) -> None:
        """Raise where the block computes more than what was read."""
        for node in self.graph.nodes:
            if node not in self._read:
                raise Unfamiliar(f"it also computes {node.target}")

    def _node(self, value: Any) -> fx.Node:
        """The node, without the identities that it passes through."""
        if not isinstance(value, fx.Node):
            raise Unfamiliar("it returns more than one tensor")
        node = value
        while isinstance(self._layer(node), nn.Identity):
            self._read.add(node)
            (node,) = node.all_input_nodes
        return node

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _taken(self, node: fx.Node) -> fx.Node:
        """Mark the node as read, and return the node that it is computed from: its first argument."""
        self._read.add(node)
        return self._node(node.args[0])

    def residual(self, node: fx.Node) -> tuple[fx.Node, bool]:
        """Return the node that is added to the input, and whether one is; the node itself where nothing is added."""
        if node.op not in ("call_function", "call_method") or node.target not in _ADDS:
            return node, False
        if len(node.args) != 2 or node.kwargs:
            raise Unfamiliar("it adds with a factor")
        self._read.add(node)
        first, second = (self._node(value) for value in node.args)
        if self.input not in (first, second):
            raise Unfamiliar("it adds something else than its input")
        return (second if first is self.input else first), True

    def dropped(self, node: fx.Node, is_drop: Callable[[nn.Module], bool]) -> tuple[fx.Node, nn.Module | None]:
        """Return the node that a layer drops samples of, and that layer."""
        layer = self._layer(node)
        if layer is None or not is_drop(layer):
            return node, None
        return self._taken(node), layer

    def activation(self, node: fx.Node) -> tuple[fx.Node, int]:
        """Return the node that an activation is applied to, and its number; without one the node itself, and the identity."""
        layer = self._layer(node)
        if layer is not None:
            number = self._activation_of(layer)
            return (node, maps.IDENTITY) if number is None else (self._taken(node), number)
        if node.op in ("call_function", "call_method") and node.target in _OF_FUNCTIONS:
            number = _OF_FUNCTIONS[node.target]
            if node.target is F.gelu:
                number = FORMS_OF_GELU.get(node.kwargs.get("approximate", "none"))
            if number is None:
                raise Unfamiliar("gelu() has another approximation than 'none' and 'tanh'")
            return self._taken(node), number
        return node, maps.IDENTITY

    def layer(self, node: fx.Node, norm_of: Callable[[nn.Module], tuple[nn.BatchNorm2d, int]]) -> tuple[fx.Node, Layer]:
        """Return the node that a convolution with normalization and activation is applied to, and these."""
        before, activation = self.activation(node)
        norm = self._layer(before)
        if norm is not None and not norm._modules and not norm._parameters and not norm._buffers:
            raise Unfamiliar(f"the activation is {type(norm).__name__}")
        if norm is None or not isinstance(norm, _BatchNorm):
            raise Unfamiliar(f"{_name(before, norm)} stands where a normalization is expected")
        found, own_activation = norm_of(norm)
        if own_activation != maps.IDENTITY:
            if activation != maps.IDENTITY:
                raise Unfamiliar("two activations follow a normalization")
            activation = own_activation
        convolved = self._taken(before)
        return self._convolution(convolved), Layer(self._kind(convolved, nn.Conv2d), found, activation)

    def _convolution(self, node: fx.Node) -> fx.Node:
        return self._taken(node)

    def _kind(self, node: fx.Node, *kinds: type[nn.Module]) -> Any:
        layer = self._layer(node)
        if not isinstance(layer, kinds):
            raise Unfamiliar(f"{_name(node, layer)} stands where a {kinds[0].__name__} is expected")
        return layer

    def gated(self, node: fx.Node) -> tuple[fx.Node, Attention | None]:
        """Return the node that a squeeze-and-excitation is applied to, and its layers."""
        if node.op not in ("call_function", "call_method") or node.target not in _PRODUCTS or len(node.args) != 2:
            return node, None
        self._read.add(node)
        first, second = (self._node(value) for value in node.args)
        reason: Unfamiliar | None = None
        for gated, gate in ((first, second), (second, first)):
            read = set(self._read)
            try:
                return gated, self._attention(gate, gated)
            except Unfamiliar as error:
                self._read, reason = read, reason or error
        assert reason is not None
        raise reason

    def _attention(self, gate: fx.Node, gated: fx.Node) -> Attention:
        if gate.op == "call_method" and gate.target == "expand_as":
            gate = self._taken(gate)
        excited, gate_activation = self.activation(gate)
        excite = self._kind(excited, nn.Conv2d, nn.Linear)
        hidden, activation = self.activation(self._taken(excited))
        reduce = self._kind(hidden, nn.Conv2d, nn.Linear)
        pooled = self._taken(hidden)
        if self._pool(pooled) is not gated:
            raise Unfamiliar("an attention looks at something else than what it gates")
        return Attention(reduce, excite, activation, gate_activation)

    def _pool(self, node: fx.Node) -> fx.Node:
        """Return the node that is averaged over all positions."""
        layer = self._layer(node)
        if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)):
            return self._taken(node)
        if node.target in _POOLS and node.args[1:] in ((1,), ((1, 1),)):
            return self._taken(node)
        if node.target in _MEANS:
            options: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
            dimensions = options.get("dim")
            over_positions = isinstance(dimensions, list | tuple) and tuple(dimensions) in ((2, 3), (-2, -1), (-1, -2))
            if over_positions and options.get("keepdim") is True:
                return self._taken(node)
        raise Unfamiliar("an attention does not begin with an average over all positions")


def _name(node: fx.Node, layer: nn.Module | None) -> str:
    if layer is not None:
        return f"a {type(layer).__name__}"
    return "the input" if node.op == "placeholder" else f"{getattr(node.target, '__name__', node.target)}()"
