"""Finds what of a network's data flow a program can compute: runs of layers with one map in and one value out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.chain import is_watched
from biasloss_ext.nn.data_flow import Flow
from biasloss_ext.nn.inference_block import InferenceBlock, InferenceConvNorm, InferenceSkipBlock, PreparedChain
from biasloss_ext.nn.program_code import Unsupported, Value, Writer
from biasloss_ext.nn.recognize import is_drop, is_linear, norm_of
from biasloss_ext.ops import maps
from biasloss_ext.ops.program.code import Operation

FEWEST_INSTRUCTIONS = 2  # of a run; one alone is as fast without


class Run(NamedTuple):
    """Nodes that one program computes.

    Attributes:
        nodes: in the order of the graph.
        input: the node of the map that they read.
        output: that of them which others read.
        writer: has the code.
    """

    nodes: list[fx.Node]
    input: fx.Node
    output: fx.Node
    writer: Writer

    @property
    def reads_any_strides(self) -> bool:
        """Whether the input need not be channels_last."""
        readers = [i.operation for i in self.writer.instructions if 0 in (i.input, i.other)]
        return readers == [Operation.CONVOLUTION]


def runs_of(flow: Flow, dtype: torch.dtype, any_convolution: bool = False) -> list[Run]:
    """Those of a network, from the first layer on, each as long as possible; for ``any_convolution`` see `Writer`."""
    nodes = [node for node in flow.graph.nodes if node.op not in ("placeholder", "output")]
    found, first = [], 0
    while first < len(nodes):
        run = _longest(flow, lambda: Writer(dtype, any_convolution), nodes[first:])
        if run is None:
            first += 1
        else:
            found.append(run)
            first += len(run.nodes)
    return found


def _longest(flow: Flow, new_writer: Callable[[], Writer], nodes: Sequence[fx.Node]) -> Run | None:
    supported = _supported(flow, new_writer, nodes)
    for count in range(len(supported), 0, -1):
        inside = set(supported[:count])
        read = [node for node in supported[:count] if not inside.issuperset(node.users)]
        if len(read) != 1:
            continue
        translation = Translation(flow, new_writer())
        for node in supported[:count]:
            translation.add(node)
        value, instructions = translation.values[read[0]], translation.writer.instructions
        is_last = len(instructions) >= FEWEST_INSTRUCTIONS and instructions[-1].output == value.number
        if is_last and not (value.is_pooled and value.rank == 4):
            assert translation.input is not None
            return Run(supported[:count], translation.input, read[0], translation.writer)
    return None


def _supported(flow: Flow, new_writer: Callable[[], Writer], nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The first nodes that one program can compute."""
    translation = Translation(flow, new_writer())
    found = []
    for node in nodes:
        try:
            translation.add(node)
        except Unsupported:
            break
        found.append(node)
    return found


class Translation:
    """Nodes as code.

    Attributes:
        writer: of the code.
        values: of the nodes.
        input: the one node that is read and was not added; None as long as none was.
    """

    def __init__(self, flow: Flow, writer: Writer) -> None:
        self.flow, self.writer = flow, writer
        self.values: dict[fx.Node, Value] = {}
        self.input: fx.Node | None = None

    def add(self, node: fx.Node) -> None:
        """Write the code of a node.

        Raises:
            Unsupported: there is none.
        """
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise Unsupported("it reads no tensor")
        x = self._value(node.args[0])
        layer = self.flow.layer(node)
        if layer is not None and is_watched(layer):
            raise Unsupported("it has hooks or a forward method of its own")
        self.values[node] = self._function(node, x) if layer is None else self._layer(node, layer, x)

    def _value(self, node: fx.Node) -> Value:
        if node in self.values:
            return self.values[node]
        if self.input is None:
            self.input = node
        if node is not self.input:
            raise Unsupported("it reads more than one map")
        return Value(0, None)

    def _layer(self, node: fx.Node, layer: nn.Module, x: Value) -> Value:
        if isinstance(layer, InferenceSkipBlock) and len(node.args) == 2:
            return self._skip(layer.prepared, x, self._value(node.args[1]))  # type: ignore[arg-type]
        if len(node.args) != 1 or node.kwargs:
            raise Unsupported("it takes other arguments than one map")
        writer = self.writer
        if isinstance(layer, InferenceBlock):
            return self._block(layer, x)
        if isinstance(layer, InferenceConvNorm):
            return self._conv_norm(layer, x)
        if type(layer) is nn.Conv2d:
            return writer.convolution(layer, layer.weight, layer.bias, x, maps.IDENTITY)
        if is_linear(layer):
            return writer.linear(layer, x)  # type: ignore[arg-type]
        if isinstance(layer, nn.Flatten):
            return self._flattened(x, (layer.start_dim, layer.end_dim))
        if isinstance(layer, _BatchNorm):
            return self._normalization(node, layer, x)
        if is_drop(layer) and not layer.training:
            return x
        return self._function(node, x)

    def _function(self, node: fx.Node, x: Value) -> Value:
        flow = self.flow
        if flow.is_pool(node):
            return self.writer.pool(x, rank=2 if self._drops_dimensions(node) else 4)
        if flow.is_call(node, (torch.flatten, "flatten")) and len(node.args) == 2 and not node.kwargs:
            return self._flattened(x, (node.args[1], -1))
        activation = flow.activation(node)
        if activation is None:
            raise Unsupported("it is no layer that a program knows")
        self._check_alone(node)
        return self.writer.activate(x, activation)

    @staticmethod
    def _check_alone(node: fx.Node) -> None:
        """Raise where something else reads what a node reads, which is replaced."""
        if len(node.args[0].users) != 1:  # type: ignore[union-attr]
            raise Unsupported("something else reads what it reads")

    def _drops_dimensions(self, node: fx.Node) -> bool:
        means = self.flow.is_call(node, (torch.mean, "mean"))
        return means and not (node.kwargs.get("keepdim", False) or (len(node.args) > 2 and node.args[2]))

    @staticmethod
    def _flattened(x: Value, dimensions: tuple[Any, Any]) -> Value:
        if not x.is_pooled or dimensions not in ((1, -1), (1, 3)):
            raise Unsupported("it flattens something else than a map of one position")
        return x._replace(rank=2)

    def _block(self, block: InferenceBlock, x: Value) -> Value:
        adds_input = block.inference_plan.adds_input
        if adds_input is None:
            raise Unsupported("a block is more than one chain")
        (chain,) = block.chains
        y = self.writer.chain(chain, x, x if adds_input else None)
        if adds_input and (y.channels != chain.channels or _strides(chain)):
            raise Unsupported("a block adds its input to a map of another shape")
        return y

    def _skip(self, chain: PreparedChain, early: Value, later: Value) -> Value:
        y = self.writer.chain(chain, self.writer.average(early, later), later)
        if y.channels != later.channels or _strides(chain):
            raise Unsupported("a skip block adds maps of different shapes")
        return y

    def _conv_norm(self, layer: InferenceConvNorm, x: Value) -> Value:
        if layer.is_pointwise:
            return self.writer.pointwise(layer.weight, layer.bias, x, layer.activation)
        convolution = layer.plain[0]  # type: ignore[index]
        if type(convolution) is not nn.Conv2d:
            raise Unsupported("a convolution may compute something else than its base class")
        return self.writer.convolution(convolution, layer.weight, layer.bias, x, layer.activation)

    def _normalization(self, node: fx.Node, norm: Any, x: Value) -> Value:
        activation = norm_of(norm)
        if not isinstance(activation, int) or norm.running_mean is None or norm.training:
            raise Unsupported("it normalizes by a batch, or applies an unknown activation")
        if x.is_pooled:
            self._check_alone(node)
        affine: Tensor = batch_norm.constant_statistics(norm, self.writer.dtype)[2:].contiguous()
        return self.writer.normalize(affine, activation, x)


def _strides(chain: PreparedChain) -> bool:
    return any(step.stride != 1 for step in chain.steps)
