"""The base of the modules of `optimize_for_inference`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.nn.scripting import NotScriptable
from biasloss_ext.ops.library import accumulation_dtype


def refuse_state_dict(*_: Any) -> None:
    """Raise before anything is loaded; also a hook."""
    raise RuntimeError(
        "a model from optimize_for_inference cannot load a state_dict, since its tensors are prepared: load it into the model "
        "it was made from, and optimize that again"
    )


class Prepared(NotScriptable, nn.Module):
    """Runs `plain` from tensors that are made from it once, and again whenever it is moved or converted.

    `plain` is a child. If no kernels can run, `plain` runs itself.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain
        self.train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        self.prepare()
        return moved

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the prepared tensors: that of the sums of its kernels."""
        return accumulation_dtype(next(self.plain.parameters()).dtype)

    def prepare(self) -> None:
        raise AssertionError("each kind has its own")

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        refuse_state_dict()

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                "a model from optimize_for_inference cannot be trained; train the model it was made from"
            )
        return super().train(False)
