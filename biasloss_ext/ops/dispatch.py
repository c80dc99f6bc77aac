"""One op of the blocks, in all its backends. The ops here know no autograd: `biasloss_ext.nn` puts forward and backward
ops together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from biasloss_ext.ops.backends import OPS, choose
from biasloss_ext.ops.library import define


class Op:
    """``biasloss_ext::name`` for the compiled kernels, ``biasloss_ext::name_triton`` for Triton's, or the reference.

    Args:
        family: the entry of `backends.OPS` that the op belongs to.
        name: of the op.
        signature: its schema without the name.
        fake: shape function.
        reference: in plain PyTorch, same arguments.
    """

    def __init__(
        self, family: str, name: str, signature: str, fake: Callable[..., Any], reference: Callable[..., Any]
    ) -> None:
        self.family = family
        self.reference = reference
        self.native = define(name, signature, fake)
        self.triton = define(f"{name}_triton", signature, fake) if "triton" in OPS[family] else None

    def __call__(self, *arguments: Any, device: torch.device, backend: str = "auto") -> Any:
        """Run the op; raises what `backends.choose` raises."""
        chosen = choose(backend, device, self.family)
        if chosen == "reference":
            return self.reference(*arguments)
        if chosen == "triton":
            assert self.triton is not None
            return self.triton(*arguments)
        return self.native(*arguments)
