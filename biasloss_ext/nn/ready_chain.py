"""A chain that remembers how it is computed while its modules stay as they are: to find out takes longer than its launches."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.nn import chain_replay
from biasloss_ext.nn.chain import Chain, why_not_fusable
from biasloss_ext.nn.fused_chain import Call, call_of, check_channels, fused_chain, operands, run_call, sources_of
from biasloss_ext.nn.snapshot import Snapshot

MOST_CALLS = 16  # of one chain; inputs of more shapes than that start over


class ReadyChain:
    """A chain, and the calls that were made of it.

    Args:
        chain: one that `chain.why_not_fusable` has no objection to, as it is now.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.snapshot: Snapshot | None = None
        self.calls: dict[Hashable, Call] = {}

    def __reduce__(self) -> Any:
        return ReadyChain, (self.chain,)

    def objection(self) -> str | None:
        """Why the chain has no fused kernels now; to be asked before each `run`."""
        if torch.compiler.is_compiling():
            return why_not_fusable(self.chain)
        if self.holds():
            return None
        self.calls.clear()
        objection = why_not_fusable(self.chain)
        self.snapshot = None if objection is not None else Snapshot(self.modules)
        return objection

    @property
    def modules(self) -> list[nn.Module]:
        return [*self.chain.layers, *self.chain.others]

    def holds(self) -> bool:
        """Whether the modules are as they were when `objection` was asked first."""
        return self.snapshot is not None and not self.snapshot.is_hooked() and self.snapshot.holds()

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`fused_chain` of the chain."""
        if self.snapshot is None or torch.compiler.is_compiling():
            return fused_chain(x, self.chain, residual)
        adds_input = residual is x
        x, residual = operands(self.chain, x, residual)
        key = (x.shape, x.dtype, x.device, adds_input)
        call = self.calls.get(key)
        if call is None:
            call = self._first_call(x, adds_input)
            # Whether processes share statistics depends on more than the modules.
            if not any(isinstance(step.norm, nn.SyncBatchNorm) for step in self.chain.steps):
                if len(self.calls) >= MOST_CALLS:
                    self.calls.clear()
                self.calls[key] = call
        return run_call(self.chain, call, x, residual)

    def _first_call(self, x: Tensor, adds_input: bool) -> Call:
        check_channels(x, self.chain.channels)
        call = call_of(self.chain, x, adds_input, None, "auto")
        options = call.options._replace(description=chain_replay.description(call.options))
        return call._replace(options=options, sources=sources_of(self.chain, options))
