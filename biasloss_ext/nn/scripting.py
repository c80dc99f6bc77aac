"""TorchScript compiles source code and cannot compile layers that choose their path in each call."""

from __future__ import annotations

from typing import Any, NoReturn


class NotScriptable:
    """A base of fused layers that makes `torch.jit.script` raise an error with advice."""

    def __prepare_scriptable__(self: Any) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: script the model before accelerate, or use torch.jit.trace, "
            "torch.export or torch.onnx, which take its plain layers; SkipblockNet is built of such layers and cannot be scripted"
        )
