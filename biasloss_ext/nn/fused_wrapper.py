"""A block of another package, run through the fused ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.nn.fused_block import Fused, fused_block, takes_fused_path, why_not_fusable
from biasloss_ext.nn.inverted_residual import InvertedResidual
from biasloss_ext.nn.recognise import Found, find, structure

_OWN = ("plain", "fused", "training")
_Tree = list[tuple[nn.Module, type[nn.Module], tuple[nn.Module | None, ...]]]


class FusedBlock(nn.Module):
    """Stands in the place of `plain` and shares everything with it: children, parameters, buffers, hooks of all kinds, and so
    the names in the state_dict; attributes and methods that it lacks are those of `plain`. Runs it as it was where no fused
    kernels can.

    Input and output as of `plain`; the output is channels_last.

    Args:
        plain: a block that `recognise.find` finds the parts of.
        fused: "auto", or True to raise where no kernels can run.
    """

    plain: nn.Module

    def __init__(self, plain: nn.Module, fused: Fused = "auto") -> None:
        super().__init__()
        self.__dict__.update(plain.__dict__)
        self.__dict__.update(plain=plain, fused=fused)  # no child: it has the children
        self._look()

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
            self._look()

    def _look(self) -> None:
        tree = [(module, type(module), tuple(module._modules.values())) for module in self.plain.modules()]
        self.__dict__.update(_tree=tree, _structure=structure(self.plain))

    def _found(self) -> Found | str:
        """The parts of the block as it is now: layers may have been exchanged, or converted to another class."""
        if isinstance(self.plain, InvertedResidual):
            return find(self.plain)
        tree: _Tree = self.__dict__["_tree"]
        # A compiler guards the modules itself.
        if not torch.compiler.is_compiling() and any(
            type(module) is not kind or tuple(module._modules.values()) != inner for module, kind, inner in tree
        ):
            self._look()
        found: Found | str = self.__dict__["_structure"]
        return found if isinstance(found, str) else why_not_fusable(found.parts) or found

    def forward(self, x: Tensor) -> Tensor:
        found = self._found()
        objection = found if isinstance(found, str) else None
        if not takes_fused_path(x, self.fused, objection, type(self.plain).__name__) or isinstance(found, str):
            self.plain.training = self.training
            result: Tensor = type(self.plain).forward(self.plain, x)
            return result
        drops = found.drop is not None and self.training and not isinstance(found.drop, nn.Identity)
        if not (found.has_residual and drops):
            return fused_block(x, found.parts, x if found.has_residual else None)
        assert found.drop is not None
        return torch.add(x, found.drop(fused_block(x, found.parts)))

    def extra_repr(self) -> str:
        return f"fused {type(self.plain).__name__}"
