"""A batch normalization with an activation in one module, as in timm, in one pass each way."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from biasloss_ext.nn.chain import Chain, Step
from biasloss_ext.nn.fused_chain import Fused, fused_chain, takes_fused_path
from biasloss_ext.nn.recognize import activation_of_norm
from biasloss_ext.nn.scripting import NotScriptable


class FusedNormActivation(NotScriptable):
    """A mixin before timm's BatchNormAct2d in the bases of a class, so that `isinstance` checks for that class still hold.

    Input and output are those of the plain module; the output is channels_last.
    """

    fused: Fused = "auto"

    def forward(self: Any, x: Tensor) -> Tensor:
        activation = activation_of_norm(self)  # at each call, as it may have been exchanged
        if isinstance(activation, str) or not takes_fused_path(x, self.fused, None, type(self).__name__):
            plain: Tensor = super().forward(x)  # type: ignore[misc]
            return plain
        return fused_chain(x, Chain((Step(None, self, activation),)))

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _fused_class(kind: Any) -> Any:
    return type(f"Fused{kind.__name__}", (FusedNormActivation, kind), {})


def _blank(kind: Any) -> Any:
    fused = _fused_class(kind)
    return fused.__new__(fused)


def fuse_norm(norm: nn.Module, fused: Fused) -> nn.Module:
    """The fused form of a BatchNormAct2d. It shares parameters, buffers, children, hooks and mode with it."""
    twin = _blank(type(norm))
    twin.__dict__.update(norm.__dict__)
    twin.fused = fused
    result: nn.Module = twin
    return result
