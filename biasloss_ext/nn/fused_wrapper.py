"""A module of another package, with its chains on the fused ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from biasloss_ext.nn.fused_chain import Fused, takes_fused_path
from biasloss_ext.nn.plan import Plan, only_map, plan_of
from biasloss_ext.nn.scripting import NotScriptable

_OWN = ("plain", "fused", "training")
MOST_PLANS = 16  # of one block; after that, plans are made again
_SETTINGS = {bool, int, float, str, type(None)}
_Modes = tuple[bool, ...]


class _Node(NamedTuple):
    """A module of the tree as it was when plans were made. The settings of layers without inner layers do not matter: these
    layers are called, or looked at in each call."""

    module: nn.Module
    kind: type[nn.Module]
    inner: tuple[nn.Module | None, ...]
    settings: list[tuple[str, Any]]

    def holds(self) -> bool:
        module, inner = self.module, self.inner
        if type(module) is not self.kind or tuple(module._modules.values()) != inner:
            return False
        return not inner or _settings_of(module) == self.settings


_Tree = list[_Node]


def _settings_of(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes that code may branch on, except for the mode, which has its own plans."""
    return [(n, v) for n, v in module.__dict__.items() if v.__class__ in _SETTINGS and n != "training"]


def _tree_of(module: nn.Module) -> _Tree:
    return [
        _Node(m, type(m), tuple(m._modules.values()), _settings_of(m) if m._modules else []) for m in module.modules()
    ]


class FusedBlock(NotScriptable, nn.Module):
    """Replaces `plain` and shares everything with it: children, parameters, buffers, hooks of all kinds, and therefore the
    names in the state_dict. Attributes and methods that it lacks are those of `plain`. If no fused kernels can run, it runs
    `plain` as it was.

    Input and output are those of `plain`; the output of a chain is channels_last.

    Args:
        plain: a module in which `plan.plan_of` finds chains.
        fused: "auto", or True to raise if no kernels can run.
    """

    plain: nn.Module

    def __init__(self, plain: nn.Module, fused: Fused = "auto") -> None:
        super().__init__()
        self.__dict__.update(plain.__dict__)
        self.__dict__.update(plain=plain, fused=fused)  # no child: it has the children
        self._forget_plans()
        self.plan()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in self.__dict__:
                raise
            return getattr(self.__dict__["plain"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in _OWN and "plain" in self.__dict__:
            setattr(self.plain, name, value)  # its own code may read it
            self._forget_plans()

    def __getstate__(self) -> dict[str, Any]:
        """Without the plans: a copy makes its own, from its own layers."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_plans", "_tree")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_plans()

    def _forget_plans(self) -> None:
        self.__dict__.update(_tree=_tree_of(self.plain), _plans={})

    def plan(self) -> Plan | str:
        """How the module is computed now. Layers may have been exchanged or converted to another class, and settings that its
        code reads may have changed."""
        tree: _Tree = self.__dict__["_tree"]
        # A compiler guards the modules itself.
        if not torch.compiler.is_compiling() and not all(node.holds() for node in tree):
            self._forget_plans()
            tree = self.__dict__["_tree"]
        modes = (self.training, *[node.module.training for node in tree[1:] if node.inner])
        plans: dict[_Modes, Plan | str] = self.__dict__["_plans"]
        if modes not in plans:
            self._make_plans(modes)
        return plans[modes]

    @property
    def fused_layers(self) -> set[nn.Module]:
        """The layers that run on fused kernels in the current mode."""
        plan = self.plan()
        chains = () if isinstance(plan, str) else plan.chains
        return {layer for planned in chains for layer in planned.chain.layers}

    def _make_plans(self, modes: _Modes) -> None:
        """For these modes of the modules that are looked into, whose code may ask for them; and at first for training and
        evaluation as wholes, before a compiler follows the calls."""
        looked_into = [node.module for node in self.__dict__["_tree"] if node.inner]
        before = [module.training for module in looked_into]
        plans: dict[_Modes, Plan | str] = self.__dict__["_plans"]
        if len(plans) >= MOST_PLANS:
            plans.clear()
        wanted = {modes} if plans else {modes, (True,) * len(modes), (False,) * len(modes)}
        try:
            for each in wanted:
                for module, training in zip(looked_into, each, strict=True):
                    module.training = training
                plans[each] = plan_of(self.plain)
        finally:
            for module, training in zip(looked_into, before, strict=True):
                module.training = training

    _make_plans._torchdynamo_disable = True  # type: ignore[attr-defined]  # as torch.compiler.disable, which imports much

    def forward(self, *arguments: Any, **options: Any) -> Any:
        x = only_map(arguments, options)
        if x is None:
            return self._forward_plain(*arguments, **options)
        plan = self.plan()
        objection = plan if isinstance(plan, str) else plan.objection()
        if not takes_fused_path(x, self.fused, objection, type(self.plain).__name__) or isinstance(plan, str):
            return self._forward_plain(x)
        return plan.run(self.plain, plan, x)

    def _forward_plain(self, *arguments: Any, **options: Any) -> Any:
        self.plain.training = self.training
        return type(self.plain).forward(self.plain, *arguments, **options)

    def extra_repr(self) -> str:
        return f"fused {type(self.plain).__name__}"
