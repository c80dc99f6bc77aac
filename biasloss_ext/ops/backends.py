"""Which backends can run here, why not, and which one is chosen."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from biasloss_ext.ops.native import covers, native, simulated

BACKENDS = ("reference", "cpu", "cuda", "triton")
COMPILED = ("cpu", "cuda")
# The backends of each op, entered by its declaration; "auto" takes the fastest that can run.
BACKENDS_OF: dict[str, tuple[str, ...]] = {}
OLDEST_CAPABILITY_FOR_TRITON = (7, 5)


def why_not(backend: str, device: torch.device, op: str = "bias_loss") -> str | None:
    """Why ``backend`` of ``op`` cannot run on tensors of ``device``, or None if it can.

    Raises:
        ValueError: unknown backend.
    """
    if backend == "reference":
        return None
    if backend in BACKENDS and backend not in BACKENDS_OF[op]:
        return f"{op} has no {backend} kernels; there are: {', '.join(BACKENDS_OF[op])}"
    if simulated() and backend in COMPILED:
        return _why_not_simulated(backend, device)
    if backend == "cpu":
        return f"it runs on CPU tensors, not on {device.type}" if device.type != "cpu" else native().problem
    if backend == "cuda":
        return f"it runs on CUDA tensors, not on {device.type}" if device.type != "cuda" else _why_not_cuda(device)
    if backend == "triton":
        return _why_not_triton(device)
    raise _unknown(backend)


def check_name(backend: str) -> None:
    """Check a name before a device is known.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in ("auto", *BACKENDS):
        raise _unknown(backend)


def _unknown(backend: str) -> ValueError:
    return ValueError(f"unknown backend {backend!r}; there are: auto, {', '.join(BACKENDS)}")


def choose(backend: str, device: torch.device, op: str = "bias_loss") -> str:
    """The backend that runs ``op``: the fastest that can run for "auto", otherwise the named one.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the named backend cannot run on ``device``; the message has the cause.
    """
    if backend == "auto":
        return _fastest(op, device)
    reason = why_not(backend, device, op)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return backend


# torch.compiler.assume_constant_result sets this; calling it would import all of Dynamo with this package.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _fastest(op: str, device: torch.device) -> str:
    # Triton's interpreter, which can run on CPU tensors, is never the fastest. A simulated GPU chooses like a GPU.
    gpu = ("cuda", "triton")
    candidates = {"cpu": gpu if simulated() else ("cpu",), "cuda": gpu}.get(device.type, ())
    return next(
        (name for name in candidates if name in BACKENDS_OF[op] and why_not(name, device, op) is None), "reference"
    )


def _why_not_simulated(backend: str, device: torch.device) -> str | None:
    if backend == "cpu":
        return "CPU tensors stand in for a GPU's in this process (BIASLOSS_SIMULATED_GPU is set)"
    if device.type != "cpu":
        return f"it runs on CPU tensors, which stand in for a GPU's in this process, not on {device.type}"
    return native().problem


def _why_not_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return None


def _why_not_cuda(device: torch.device) -> str | None:
    reason = _why_not_gpu() or native().problem
    if reason is not None:
        return reason
    architectures = native().cuda_architectures
    if not architectures:
        return "the package was built without CUDA kernels (nvcc was not found); set CUDA_HOME and reinstall"
    capability = torch.cuda.get_device_capability(device)
    if not covers(architectures, capability):
        return (
            f"the CUDA kernels are built for {', '.join(architectures)}, the GPU has compute capability "
            f"{capability[0]}.{capability[1]}; reinstall with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
        )
    return None


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "it runs on CUDA tensors (on CPU tensors only under TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"it runs on CUDA tensors, not on {device.type}"
    reason = _why_not_gpu()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY_FOR_TRITON:
        return f"Triton needs compute capability 7.5, the GPU has {capability[0]}.{capability[1]}"
    return None


def under_transform(backend: str) -> str:
    """The backend inside torch.func's transforms, which only plain PyTorch has rules for."""
    if backend != "auto":
        raise RuntimeError(
            f"backend {backend!r} cannot run under torch.func (grad, vmap, jvp): its kernels have no rules for transforms; "
            "use backend='reference'"
        )
    return "reference"
