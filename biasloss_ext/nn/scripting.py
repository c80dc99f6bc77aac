"""TorchScript compiles source code and cannot compile layers that choose their path in each call."""

from __future__ import annotations

from typing import Any, NoReturn


class NotScriptable:
    """A base of fused layers that makes `torch.jit.script` raise an error with advice."""

    def __prepare_scriptable__(self: Any) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: script the model before accelerate, or build it with "
            "fused=False; torch.jit.trace, torch.export and torch.onnx use the plain layers of this one"
        )
