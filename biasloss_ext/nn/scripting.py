"""TorchScript, which compiles source code, has no use for layers that choose their path in each call."""

from __future__ import annotations

from typing import Any, NoReturn


class NotScriptable:
    """A base of fused layers, which `torch.jit.script` asks for a form that it can compile."""

    def __prepare_scriptable__(self: Any) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: script the model before accelerate, or build it with "
            "fused=False; torch.jit.trace, torch.export and torch.onnx take the plain layers of this one"
        )
