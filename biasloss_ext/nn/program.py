"""Runs what can be of a network as programs, and the rest as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from biasloss_ext.nn.data_flow import Flow, Unfamiliar, is_leaf
from biasloss_ext.nn.plan import Generated, only_map
from biasloss_ext.nn.prepared import Prepared
from biasloss_ext.nn.program_search import Run, runs_of
from biasloss_ext.nn.snapshot import Snapshot
from biasloss_ext.ops import maps
from biasloss_ext.ops.backends import choose
from biasloss_ext.ops.program.op import program
from biasloss_ext.ops.registry import is_traced
from biasloss_ext.ops.tracing import exporting, transformed

DTYPES = (torch.float32, torch.float64)


class Segment:
    """A run as code, and as the layers that it stands for."""

    def __init__(self, run: Run) -> None:
        self.dtype, self.channels = run.writer.dtype, run.writer.input_channels
        self.constants, self.code = run.writer.constants, run.writer.code()
        self.reads_any_strides = run.reads_any_strides
        self.layers = _function(run.input, run.nodes, run.output)

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.dtype is not self.dtype or x.shape[1] != self.channels or x.numel() == 0:
            return self.layers.forward(network, None, x)
        x = x if self.reads_any_strides else maps.channels_last(x)
        result: Tensor = program.native(x, self.constants, self.code)
        return result


def run_segment(owner: Any, index: int, x: Tensor) -> Tensor:
    """As the generated functions call it."""
    result: Tensor = owner.segments[index](owner.network, x)
    return result


def _function(source: fx.Node, nodes: Iterable[fx.Node], output: fx.Node, runs: Iterable[Run] = ()) -> Generated:
    """The function (network, owner, x) of these nodes, in which each run is a call of `run_segment`."""
    graph = fx.Graph()
    owner = graph.placeholder("owner")
    of_node = {source: graph.placeholder("x")}
    starts = {run.nodes[-1]: (index, run) for index, run in enumerate(runs)}
    inner = {node for _, run in starts.values() for node in run.nodes}
    for node in nodes:
        if node in starts:
            index, run = starts[node]
            of_node[run.output] = graph.call_function(run_segment, (owner, index, of_node[run.input]))
        elif node not in inner:
            of_node[node] = graph.node_copy(node, lambda n: of_node[n])
    graph.output(of_node[output])
    code = graph.python_code("self")
    return Generated(code.src, code.globals)


def _called(network: nn.Module) -> Iterator[nn.Module]:
    """The modules that are called or looked into."""
    yield network
    if not is_leaf(network):
        for child in network.children():
            yield from _called(child)


class NetworkProgram:
    """The method ``forward`` of a network that has been optimized for inference: programs for the longest runs of its layers that
    kernels compute, which then pass from one to the next without Python; the layers as they are elsewhere, and wherever something
    waits for the calls of layers, records them or needs gradients.

    Modules may be exchanged, converted and moved: what has been made of them is checked at each call, and made again.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._made: Made | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"network": self.network}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["network"])  # type: ignore[misc]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        network = self.network
        x = only_map(arguments, options)
        if torch.compiler.is_compiling() or x is None or not _can_run(x):
            return type(network).forward(network, *arguments, **options)
        made = self._made
        if made is None or made.dtype is not x.dtype or not made.snapshot.holds():
            made = self._made = Made(network, x.dtype)
        needs_gradients = torch.is_grad_enabled() and (x.requires_grad or made.has_gradients())
        if made.function is None or needs_gradients or made.snapshot.is_hooked():
            return type(network).forward(network, x)
        return made.function.forward(network, made, x)


class Made:
    """What a `NetworkProgram` has made of a network for one dtype, with what ``make_segment`` makes of each run.

    Attributes:
        function: of the whole network; None where no part of it is a program.
        outside: the nodes that no program computes.
    """

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        make_segment: Callable[[Run, int], Any] = lambda run, index: Segment(run),
        any_convolution: bool = False,
    ) -> None:
        self.network, self.dtype = network, dtype
        called = [*_called(network)]
        # The network's own hooks are run by whoever calls it.
        self.snapshot = Snapshot(called, [m for m in called if m is not network], keeps_parameters=True)
        of_torch = (m for m in called if is_leaf(m) and not isinstance(m, Prepared))
        self.parameters = [parameter for module in of_torch for parameter in module.parameters()]
        self.segments: list[Any] = []
        self.outside: list[fx.Node] = []
        self.function: Generated | None = None
        plain = network.__class__.__new__(network.__class__)  # with the method of its class
        plain.__dict__.update({name: value for name, value in network.__dict__.items() if name != "forward"})
        try:
            flow = Flow(plain)
        except Unfamiliar:
            return
        runs = runs_of(flow, dtype, any_convolution)
        self.segments = [make_segment(run, index) for index, run in enumerate(runs)]
        nodes = [node for node in flow.graph.nodes if node.op not in ("placeholder", "output")]
        inside = {node for run in runs for node in run.nodes}
        self.outside = [node for node in nodes if node not in inside]
        if runs:
            self.function = _function(flow.input, nodes, flow.output, runs)

    def has_gradients(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters)


def _can_run(x: Any) -> bool:
    """Whether programs can compute what they are given, and nothing records or transforms it."""
    if type(x) is not Tensor or x.dtype not in DTYPES or x.device.type != "cpu" or is_traced(x) or exporting(x):
        return False
    if x.dtype is not torch.float64 and torch.is_autocast_enabled("cpu"):  # which leaves float64 alone
        return False
    if _has_any_global_hook() or transformed(x):
        return False
    return choose("auto", x.device, "program") == "cpu"


def attach_programs(module: nn.Module) -> None:
    """Give a module, or those of its children that torch.fx can follow, a `NetworkProgram`."""
    if is_leaf(module) or "forward" in module.__dict__:
        return
    try:
        Flow(module)
    except Unfamiliar:
        for child in module.children():
            attach_programs(child)
        return
    module.forward = NetworkProgram(module)  # type: ignore[method-assign, assignment]


def detach_programs(module: nn.Module) -> None:
    """Undo `attach_programs`."""
    for inner in module.modules():
        if isinstance(inner.__dict__.get("forward"), NetworkProgram):
            del inner.__dict__["forward"]
