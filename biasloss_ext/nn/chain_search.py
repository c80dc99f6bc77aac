"""Finds the chains in the data flow of a module: by what it computes, not by what anything is called."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx, nn

from biasloss_ext.nn.chain import Chain, Gate, Step, why_not_convolved
from biasloss_ext.nn.chain_parts import NO_CONVOLUTION, POINTWISE
from biasloss_ext.nn.data_flow import ADDS, PRODUCTS, RESHAPES, SIZES, Flow
from biasloss_ext.nn.recognize import is_channel_scale, is_drop, norm_of
from biasloss_ext.ops import maps


class FoundChain(NamedTuple):
    """A chain in a graph.

    Attributes:
        chain: its modules.
        input: the node that it is applied to.
        output: the node whose value it computes.
        residual: the node that is added at the end; None for none.
        drop: the layer that drops samples or elements before that.
        nodes: all nodes that it computes.
    """

    chain: Chain
    input: fx.Node
    output: fx.Node
    residual: fx.Node | None = None
    drop: nn.Module | None = None
    nodes: tuple[fx.Node, ...] = ()

    @property
    def last(self) -> Step:
        return self.chain.steps[-1]

    def followed(
        self, node: fx.Node, *layers: nn.Module, steps: tuple[Step, ...] | None = None, **changes: Any
    ) -> FoundChain:
        """With one node more, and the modules that it calls."""
        chain = Chain(self.chain.steps if steps is None else steps, (*self.chain.others, *layers))
        return self._replace(chain=chain, output=node, nodes=(*self.nodes, node), **changes)

    def with_last(self, node: fx.Node, *layers: nn.Module, **changes: Any) -> FoundChain:
        """With one node more, which belongs to the last step."""
        return self.followed(node, *layers, steps=(*self.chain.steps[:-1], self.last._replace(**changes)))


class Search:
    """All chains of a data flow, each as long as can be.

    Attributes:
        reasons: why a convolution or normalization is in none of them, by module.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.reasons: dict[nn.Module, str] = {}
        self._open: dict[fx.Node, FoundChain] = {}
        self._order = {node: index for index, node in enumerate(flow.graph.nodes)}
        for node in flow.graph.nodes:
            found = self._extended(node)
            if found is not None:
                self._open[node] = found

    def chains(self) -> list[FoundChain]:
        """In the order of their outputs. Each has a normalization, and an input that nobody changes while it runs."""
        inner = {node for found in self._open.values() for node in found.nodes if node is not found.output}
        return [
            found
            for node, found in self._open.items()
            if node not in inner
            and any(step.norm is not None or step.kind == NO_CONVOLUTION for step in found.chain.steps)
            and not self._is_changed(found)
        ]

    def _is_changed(self, found: FoundChain) -> bool:
        """Whether something else changes the input in place before the chain has run."""
        end = self._order[found.output]
        return any(
            user not in found.nodes and self._order[user] < end and self.flow.changes_its_argument(user)
            for user in found.input.users
        )

    def _alone(self, node: Any, user: fx.Node) -> FoundChain | None:
        """The chain that ends at a node, if nothing else uses that."""
        found = self._open.get(node) if isinstance(node, fx.Node) else None
        if found is None or list(found.output.users) != [user] or found.residual is not None:
            return None
        return found

    def _extended(self, node: fx.Node) -> FoundChain | None:
        """The chain that ends with this node."""
        if node.op not in ("call_module", "call_function", "call_method") or not node.args:
            return None
        layer = self.flow.layer(node)
        before = self._alone(node.args[0], node)
        if isinstance(layer, nn.Conv2d):
            return self._convolution(node, layer, before)
        if layer is not None and type(layer) is nn.Identity:
            return None if before is None else before.followed(node, layer)
        if layer is not None and is_drop(layer):
            added = before is not None and all(self.flow.is_call(user, ADDS) for user in node.users)
            return before.followed(node, drop=layer) if added and before is not None and before.drop is None else None
        if before is not None and before.drop is not None:
            before = None
        number = self.flow.activation(node)
        if number is not None:
            return self._activation(node, layer, number, before)
        if layer is not None and is_channel_scale(layer):
            return self._scale(node, (layer, next(iter(layer._parameters))), before, layer)
        if layer is not None:
            return self._normalization(node, layer, before)
        if self.flow.is_call(node, PRODUCTS):
            return self._product(node)
        return self._sum(node) if self.flow.is_call(node, ADDS) else None

    def _convolution(self, node: fx.Node, layer: nn.Conv2d, before: FoundChain | None) -> FoundChain | None:
        objection = why_not_convolved(layer)
        if objection is not None:
            self.reasons[layer] = objection
            return None
        step = Step(layer, None)
        source = node.args[0]
        if before is None or not self._continues(before, step):
            return FoundChain(Chain((step,)), source, node, nodes=(node,))  # type: ignore[arg-type]
        return before.followed(node, steps=(*before.chain.steps, step))

    @staticmethod
    def _continues(before: FoundChain, step: Step) -> bool:
        """Whether a convolution can be one more step: only a 1x1 one applies a gate, and none after the first skips rows."""
        if before.drop is not None or step.kind == NO_CONVOLUTION or step.skips > 1:
            return False
        return before.last.gate is None or step.kind == POINTWISE

    def _normalization(self, node: fx.Node, layer: nn.Module, before: FoundChain | None) -> FoundChain | None:
        found = norm_of(layer)
        if found is None:
            return None
        if isinstance(found, str):
            self.reasons[layer] = found
            return None
        inner = tuple(layer._modules.values())
        convolves = before is not None and before.last.kind != NO_CONVOLUTION
        if before is not None and convolves and before.last._replace(convolution=None) == Step(None, None):
            return before.with_last(node, *inner, norm=layer, activation=found)  # type: ignore[arg-type]
        source = node.args[0]
        return FoundChain(Chain((Step(None, layer, found),), inner), source, node, nodes=(node,))  # type: ignore[arg-type]

    def _activation(
        self, node: fx.Node, layer: nn.Module | None, number: int, before: FoundChain | None
    ) -> FoundChain | None:
        if before is None or before.last.activation != maps.IDENTITY or before.last.gate is not None:
            return None
        return before.with_last(node, *(() if layer is None else (layer,)), activation=number)

    def _scale(
        self, node: fx.Node, scale: tuple[nn.Module, str], before: FoundChain | None, *layers: nn.Module
    ) -> FoundChain | None:
        last = None if before is None else before.last
        if before is None or last is None or last.activation != maps.IDENTITY or last.gate is not None or last.scale:
            return None
        return before.with_last(node, *layers, scale=scale)

    def _product(self, node: fx.Node) -> FoundChain | None:
        if len(node.args) != 2 or not all(isinstance(value, fx.Node) for value in node.args):
            return None
        first, second = node.args
        for scaled, factors in ((first, second), (second, first)):
            found, of_channels = self._alone(scaled, node), self.flow.channel_factors(factors)  # type: ignore[arg-type]
            if found is not None and found.drop is None and of_channels is not None:
                parameter, nodes = of_channels
                extended = self._scale(node, parameter, found)
                return None if extended is None else extended._replace(nodes=(*extended.nodes, *self._own(nodes, node)))
        for gated, gate in ((first, second), (second, first)):
            found = self._open.get(gated)  # type: ignore[arg-type]
            if found is not None and found.residual is None and found.drop is None and found.last.gate is None:
                attention = Attention(self.flow, gate, gated, node)  # type: ignore[arg-type]
                if attention.gate is not None and self._feeds_pointwise(node):
                    for inner in attention.nodes:
                        self._open.pop(inner, None)
                    step = found.last._replace(gate=attention.gate)
                    followed = found.followed(node, *attention.others, steps=(*found.chain.steps[:-1], step))
                    return followed._replace(nodes=(*followed.nodes, *attention.nodes))
        return None

    @staticmethod
    def _own(nodes: list[fx.Node], user: fx.Node) -> list[fx.Node]:
        """Those that lead to a node alone."""
        own = {user}
        for node in nodes:
            if own.issuperset(node.users):
                own.add(node)
        return [node for node in nodes if node in own]

    def _feeds_pointwise(self, node: fx.Node) -> bool:
        """Whether the only user of a node is a 1x1 convolution of a chain: the ops gate what those load."""
        users = list(node.users)
        while len(users) == 1 and isinstance(self.flow.layer(users[0]), nn.Identity):
            users = list(users[0].users)
        layer = self.flow.layer(users[0]) if len(users) == 1 else None
        if not isinstance(layer, nn.Conv2d) or why_not_convolved(layer) is not None:
            return False
        step = Step(layer, None)
        return step.kind == POINTWISE and step.skips == 1

    def _sum(self, node: fx.Node) -> FoundChain | None:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(value, fx.Node) for value in node.args):
            return None
        candidates = []
        for own, other in (node.args, reversed(node.args)):
            found = self._alone(own, node)
            if found is not None and found.last.gate is None and own is not other:
                candidates.append((len(found.chain.steps), found, other))
        if not candidates:
            return None
        _, found, other = max(candidates, key=lambda candidate: candidate[0])
        return found.followed(node, residual=other)


class Attention:
    """A squeeze-and-excitation: the way from a gate back to the average of what it gates.

    Attributes:
        gate: its layers; None where the way is another.
        nodes: what it computes.
        others: the modules of activations, which are not called.
    """

    def __init__(self, flow: Flow, gate: fx.Node, gated: fx.Node, product: fx.Node) -> None:
        self.flow = flow
        self.nodes: list[fx.Node] = []
        self.others: list[nn.Module] = []
        self.gate = self._found(gate, gated)
        allowed = {*self.nodes, product}
        sizes = [user for user in gated.users if flow.is_call(user, SIZES)]
        while sizes:  # what a reshape asks for
            node = sizes.pop()
            self.nodes.append(node)
            allowed.add(node)
            sizes += [user for user in node.users if flow.is_call(user, SIZES) and user not in allowed]
        if any(user not in allowed for node in (gated, *self.nodes) for user in node.users):
            self.gate = None

    def _found(self, node: fx.Node, gated: fx.Node) -> Gate | None:
        node, gate_activation = self._activation(self._shaped(node))
        node, excite = self._layer(self._shaped(node))
        if excite is None:
            return None
        node, activation = self._activation(self._shaped(node))
        node, reduce = self._layer(self._shaped(node))
        if reduce is None:
            return None
        pool = self._shaped(node)
        if not self.flow.is_pool(pool) or pool.args[0] is not gated:
            return None
        self.nodes.append(pool)
        layer = self.flow.layer(pool)
        self.others += [] if layer is None else [layer]
        return Gate(reduce, excite, activation, gate_activation)

    def _taken(self, node: fx.Node) -> fx.Node:
        self.nodes.append(node)
        return node.args[0]  # type: ignore[return-value]

    def _shaped(self, node: fx.Node) -> fx.Node:
        """The node, without the reshapes and identities that it passes through."""
        while isinstance(node, fx.Node) and node.args:
            layer = self.flow.layer(node)
            if type(layer) in (nn.Identity, nn.Flatten):
                self.others.append(layer)  # type: ignore[arg-type]
            elif not self.flow.is_call(node, (*RESHAPES, "expand_as")):
                break
            node = self._taken(node)
        return node

    def _activation(self, node: fx.Node) -> tuple[fx.Node, int]:
        number = self.flow.activation(node) if isinstance(node, fx.Node) else None
        if number is None:
            return node, maps.IDENTITY
        layer = self.flow.layer(node)
        self.others += [] if layer is None else [layer]
        return self._taken(node), number

    def _layer(self, node: fx.Node) -> tuple[fx.Node, Any]:
        layer = self.flow.layer(node) if isinstance(node, fx.Node) else None
        if isinstance(layer, nn.Conv2d):
            plain = (layer.kernel_size, layer.stride, layer.groups, layer.padding) == ((1, 1), (1, 1), 1, (0, 0))
            return (self._taken(node), layer) if plain else (node, None)
        return (self._taken(node), layer) if isinstance(layer, nn.Linear) else (node, None)
