"""A GPU that runs nothing: Triton's own binder and launches without a device, and launchers of compiled kernels that only
allocate their outputs. What a step launches, and how long the host takes for it, can so be measured on any machine.

Import it before anything that imports Triton kernels, in a separate process.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from biasloss_ext.ops import backends, registry
from biasloss_ext.ops.bias_loss import op as bias_loss

launches: collections.Counter[str] = collections.Counter()
# Kernels that one call of a compiled op launches.
OF_NATIVE = {"depthwise": 1, "depthwise_backward": 1, "bias_loss": 1, "bias_loss_backward": 1, "feature_variance": 1}


class StubDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return (9, 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class StubKernel:
    """A compiled kernel that counts its launches."""

    function = None
    packed_metadata = None

    def __init__(self, name: str) -> None:
        self.name = name

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_: Any) -> None:
        assert 0 < x < 2**31 and 0 < y < 65536 and 0 < z < 65536, f"{self.name}: grid {(x, y, z)}"
        launches[self.name] += 1


def _do_compile(self: Any, key: Any, signature: Any, device: int, *_: Any) -> StubKernel:
    kernel = StubKernel(self._fn_name.split(".")[-1])
    self.device_caches[device][0][key] = kernel
    return kernel


def _stubbed(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        launches[name] += OF_NATIVE[name]
        return fake(*arguments, **options)

    return run


def install() -> None:
    """CPU tensors stand in for a GPU's from here on."""
    driver.set_active(StubDriver())
    jit.JITFunction._do_compile = _do_compile
    for name, op in registry.OPS.items():
        if name in OF_NATIVE:
            op.native = _stubbed(name, op.fake)
    bias_loss.native.run = _stubbed("bias_loss", bias_loss.forward.fake)
    bias_loss.native.run_backward = _stubbed("bias_loss_backward", bias_loss.backward.fake)
    backends._fastest = _as_on_a_gpu


def _as_on_a_gpu(op: str, device: torch.device) -> str:
    return next((name for name in ("cuda", "triton") if name in backends.BACKENDS_OF[op]), "reference")
