"""A block of another package, run through the fused ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biasloss_ext.nn.fused_block import Fused, fused_block, takes_fused_path
from biasloss_ext.nn.recognise import find


class FusedBlock(nn.Module):
    """Stands in the place of `plain` and shares everything with it: children, parameters, buffers, hooks, mode, and so the
    names in the state_dict. Runs it as it was where no fused kernels can.

    Input and output as of `plain`; the output is channels_last.

    Args:
        plain: a block that `recognise.is_block` knows.
        fused: "auto", or True to raise where no kernels can run.
    """

    plain: nn.Module

    def __init__(self, plain: nn.Module, fused: Fused = "auto") -> None:
        super().__init__()
        self.__dict__["plain"] = plain  # not a child: its children are this module's own
        self.fused = fused
        self.training = plain.training
        for name in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            self.__dict__[name] = plain.__dict__[name]

    def forward(self, x: Tensor) -> Tensor:
        found = find(self.plain)  # at each call: a converted normalisation is another module
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
