"""How a module of another package is computed: some layers run as chains, the rest as before."""

from __future__ import annotations

import importlib
import itertools
import linecache
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from biasloss_ext.nn.chain import Chain, why_not_bypassed
from biasloss_ext.nn.chain_search import FoundChain, Search
from biasloss_ext.nn.data_flow import Flow, Unfamiliar
from biasloss_ext.nn.ready_chain import ReadyChain

_numbers = itertools.count()


class PlannedChain(NamedTuple):
    """A chain of a plan, and the layer that drops samples or elements of its result before an addition."""

    ready: ReadyChain
    drop: nn.Module | None

    @property
    def chain(self) -> Chain:
        return self.ready.chain


class Generated:
    """The function ``forward`` of source code that torch.fx wrote from a graph. Unlike a function it can be pickled."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source, self.names = source, dict(names)
        name = f"<biasloss_ext plan {next(_numbers)}>"
        # This makes tracebacks show the source, and torch.compile find it.
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        values = dict(names)
        exec(compile(source, name, "exec"), values)
        self.forward: Callable[[nn.Module, Any, Tensor], Tensor] = values["forward"]

    def __reduce__(self) -> Any:
        modules = {name: value.__name__ for name, value in self.names.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self.names.items() if name not in modules}
        return _generated, (self.source, others, modules)


def _generated(source: str, names: dict[str, Any], modules: dict[str, str]) -> Generated:
    return Generated(source, {**names, **{name: importlib.import_module(module) for name, module in modules.items()}})


class Plan(NamedTuple):
    """How a module is computed.

    Attributes:
        chains: the chains of the module, in order.
        adds_input: for a module that is only one chain, whether its input is added to the result; None for other modules.
        generated: for other modules, the function (module, owner, x) that computes the module; it gets the results of the
            chains from ``owner.run_chain``.
        bypassed: modules that are traced through and therefore never called.
        reasons: why layers are not in a chain, by layer.
    """

    chains: tuple[PlannedChain, ...]
    adds_input: bool | None
    generated: Generated | None
    bypassed: tuple[nn.Module, ...]
    reasons: dict[nn.Module, str]

    def run(self, module: nn.Module, owner: Any, x: Tensor) -> Tensor:
        """The module's result, with the results of chains from ``owner.run_chain(index, x, residual)``."""
        if self.adds_input is not None:
            return run_chain(owner, 0, x, x if self.adds_input else None)
        assert self.generated is not None
        return self.generated.forward(module, owner, x)

    def run_chain(self, index: int, x: Tensor, residual: Tensor | None) -> Tensor:
        """``drop(chain(x)) + residual`` on the fused ops, with gradients."""
        ready, drop = self.chains[index]
        drops = drop is not None and drop.training and type(drop) is not nn.Identity
        if residual is None or (not drops and fits(x, ready.chain, residual)):
            return ready.run(x, residual)
        out = ready.run(x)
        return torch.add(residual, out if drop is None else drop(out))

    def objection(self) -> str | None:
        """Why the plan is no longer valid; None if it is. Asked in each call, as hooks and attributes may have changed."""
        for planned in self.chains:
            objection = planned.ready.objection()
            if objection is not None:
                return objection
        return why_not_bypassed(Chain((), self.bypassed))


def plan_of(module: nn.Module) -> Plan | str:
    """How a module is computed, or why no part of it runs on fused kernels. Tracing takes a few milliseconds."""
    if "forward" in module.__dict__:
        return "it has a forward method of its own"
    try:
        flow = Flow(module)
    except Unfamiliar as unfamiliar:
        return str(unfamiliar)
    search = Search(flow)
    found = search.chains()
    if not found:
        return next(iter(search.reasons.values()), "no normalization follows a convolution of it")
    chains = tuple(PlannedChain(ReadyChain(f.chain), f.drop) for f in found)
    in_chains = {layer for f in found for layer in f.chain.layers}
    adds_input = _of_whole(flow, found)
    called = flow.called if adds_input is None else {layer for layer in flow.called if type(layer) is not nn.Identity}
    # A normalization that is called handles its children itself.
    inner = {child for layer in called for child in layer.modules() if child is not layer}
    bypassed = tuple(m for m in module.modules() if m is not module and m not in called and m not in inner | in_chains)
    reasons = {layer: reason for layer, reason in search.reasons.items() if layer not in in_chains}
    generated = None if adds_input is not None else _compiled(flow, found)
    return Plan(chains, adds_input, generated, bypassed, reasons)


def whole(chain: Chain, adds_input: bool) -> Plan:
    """The plan of a module that is one chain."""
    return Plan((PlannedChain(ReadyChain(chain), None),), adds_input, None, (), {})


def _of_whole(flow: Flow, found: list[FoundChain]) -> bool | None:
    """Whether the input is added to the only chain of the module; None if the module is more than one chain and identities."""
    first = found[0]
    others = {node for node in flow.graph.nodes if node.op not in ("placeholder", "output")} - set(first.nodes)
    if any(type(flow.layer(node)) is not nn.Identity for node in others):
        return None
    if _source(flow, first.input) is not flow.input or _source(flow, flow.output) is not _source(flow, first.output):
        return None
    residual = None if first.residual is None else _source(flow, first.residual)
    return residual is not None if residual in (None, flow.input) else None


def _source(flow: Flow, node: fx.Node) -> fx.Node:
    """The node, without the identities that it passes through."""
    while type(flow.layer(node)) is nn.Identity:
        node = node.args[0]  # type: ignore[assignment]
    return node


def run_chain(owner: Any, index: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """As the generated functions call it."""
    result: Tensor = owner.run_chain(index, x, residual)
    return result


def _compiled(flow: Flow, found: list[FoundChain]) -> Generated:
    """The function of a graph with one call per chain."""
    graph = fx.Graph()
    of_node: dict[fx.Node, fx.Node] = {}
    owner: fx.Node | None = None
    ends = {f.output: (index, f) for index, f in enumerate(found)}
    inner = {node for f in found for node in f.nodes}
    for node in flow.graph.nodes:
        if node is flow.input:
            owner = graph.placeholder("owner")
        if node in ends:
            index, f = ends[node]
            operands = [of_node[n] for n in (f.input, f.residual) if n is not None]
            of_node[node] = graph.call_function(run_chain, (owner, index, *operands))
        elif node not in inner:
            of_node[node] = graph.node_copy(node, lambda n: of_node[n])
    code = graph.python_code("self")
    return Generated(code.src, code.globals)


def only_map(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The map, or a proxy for one, if it is the only argument of the call; otherwise None."""
    is_map = len(arguments) == 1 and not options and hasattr(arguments[0], "dim")
    return arguments[0] if is_map else None


def fits(x: Tensor, chain: Chain, residual: Tensor) -> bool:
    """Whether the residual has the shape of the chain's output and needs no broadcast."""
    samples, channels, height, width = x.shape
    for step in chain.steps:
        channels = channels if step.convolution is None else step.convolution.out_channels
        height, width = step.output_size(height, width)
    return residual.shape == (samples, channels, height, width)
