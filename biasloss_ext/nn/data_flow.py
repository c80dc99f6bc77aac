"""The data flow of a module, as a graph of its innermost layers.

`torch.fx` follows a module's own ``forward`` with its actual layers. The graph shows what is computed, regardless of the
author of the module and the names of its classes.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from biasloss_ext.nn.activations import FORMS_OF_GELU, FUNCTIONS
from biasloss_ext.nn.prepared import Prepared
from biasloss_ext.nn.recognize import activation_of


class Unfamiliar(Exception):
    """A module has no fused kernels; the message says why."""


_IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv}
ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
RESHAPES = (
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    "view",
    "reshape",
    "flatten",
    "squeeze",
    "unsqueeze",
)
SIZES = ("size", getattr, operator.getitem)


_torch_fx = fx.Tracer()  # which knows torch's own layers


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is called as it is, rather than looked into."""
    if not module._modules or isinstance(module, _BatchNorm | Prepared):
        return True
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)  # which nobody calls
    return not is_list and _torch_fx.is_leaf_module(module, "")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_leaf(module)

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """Skip the hooks of modules that are traced through: the hooks expect tensors."""
        name = self.path_of_module(module)
        if self.is_leaf_module(module, name):
            return self.create_proxy("call_module", name, arguments, options)
        return module.forward(*arguments, **options)


def _shadow(module: nn.Module) -> nn.Module:
    """A module with the same layers and parameters in its own containers, so that values that its code caches do not end up in
    the module itself."""
    shadows: dict[nn.Module, nn.Module] = {}

    def of(original: nn.Module) -> nn.Module:
        if original not in shadows:
            shadow = shadows[original] = original.__class__.__new__(original.__class__)
            containers = (dict, list, set)
            shadow.__dict__.update(
                {n: copy.copy(v) if isinstance(v, containers) else v for n, v in original.__dict__.items()}
            )
            for name, child in original._modules.items():
                shadow._modules[name] = None if child is None else of(child)
        return shadows[original]

    return of(module)


class Flow:
    """The computation of a module that takes one tensor.

    Attributes:
        graph: the layers, functions and methods that are called.
        input: the node of the input tensor.
        output: the node of the result.

    Raises:
        Unfamiliar: the module cannot be traced, or takes or returns more than one tensor.
    """

    def __init__(self, module: nn.Module) -> None:
        try:
            self.graph = _Tracer().trace(_shadow(module))
        except Exception as error:  # the module's own code may raise anything for a proxy of a tensor
            raise Unfamiliar(f"its data flow cannot be traced: {(str(error).splitlines() or ['?'])[0]}") from error
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._check_tensors(module)
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise Unfamiliar(f"it takes {len(inputs)} inputs")
        self.input: fx.Node = inputs[0]
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        if not isinstance(output.args[0], fx.Node):
            raise Unfamiliar("it does not return exactly one tensor")
        self.output: fx.Node = output.args[0]

    def _check_tensors(self, module: nn.Module) -> None:
        """Raise if the graph holds a tensor that is not a parameter or buffer: the module has kept it from another call."""
        known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in known:
                raise Unfamiliar("it keeps tensors from one call to another")

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls."""
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def channel_factors(self, node: fx.Node) -> tuple[tuple[nn.Module, str], list[fx.Node]] | None:
        """The parameter, as its module and its name there, that a node reshapes to multiply the channels of a map, and the
        nodes that lead there."""
        nodes, shapes = [node], []
        while self.is_call(node, (*RESHAPES, operator.getitem)) and node.args:
            shapes.append(node)
            node = node.args[0]  # type: ignore[assignment]
            nodes.append(node)
        if node.op != "get_attr":
            return None
        owner, _, name = str(node.target).rpartition(".")
        parameter = self._modules[owner]._parameters.get(name)
        if parameter is None:
            return None
        given = torch.empty(parameter.shape, device="meta")
        try:
            for shape in reversed(shapes):
                function = getattr(given, shape.target) if shape.op == "call_method" else shape.target  # type: ignore[arg-type]
                arguments = shape.args[1:] if shape.op == "call_method" else (given, *shape.args[1:])
                given = function(*arguments, **shape.kwargs)  # type: ignore[operator]
        except Exception:  # sizes unknown before the call
            return None
        count = parameter.numel()
        return ((self._modules[owner], name), nodes) if given.shape in ((count, 1, 1), (1, count, 1, 1)) else None

    @property
    def called(self) -> set[nn.Module]:
        """The layers that are called; all other modules are traced through."""
        return {layer for node in self.graph.nodes if (layer := self.layer(node)) is not None}

    def is_call(self, node: fx.Node, targets: Any) -> bool:
        """Whether a node calls one of these functions or methods."""
        return node.op in ("call_function", "call_method") and node.target in targets

    def activation(self, node: fx.Node) -> int | None:
        """The number of the activation that a node applies to its first argument."""
        layer = self.layer(node)
        if layer is not None:
            return activation_of(layer)
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target is F.gelu:
            return FORMS_OF_GELU.get(node.kwargs.get("approximate", "none"))
        return FUNCTIONS.get(node.target) if node.kwargs.keys() <= {"inplace"} else None

    def changes_its_argument(self, node: fx.Node) -> bool:
        """Whether a node overwrites its argument."""
        layer = self.layer(node)
        if layer is not None:
            return bool(getattr(layer, "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_")
        return node.target in _IN_PLACE or node.kwargs.get("inplace") is True

    def is_pool(self, node: fx.Node) -> bool:
        """Whether a node averages its first argument over all positions."""
        layer = self.layer(node)
        if layer is not None:
            return isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
        if node.target is F.adaptive_avg_pool2d:
            return node.args[1:] in ((1,), ((1, 1),), ([1, 1],))
        if node.target not in (torch.mean, "mean"):
            return False
        options: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
        dimensions = options.get("dim")
        return isinstance(dimensions, list | tuple) and tuple(dimensions) in ((2, 3), (-2, -1), (-1, -2), (3, 2))
