"""``biasloss info``: which backends can run here, and why the others cannot."""

from __future__ import annotations

import importlib.util
import platform

import torch

from biasloss_ext.ops.backends import BACKENDS, choose, why_not
from biasloss_ext.ops.native import SIMULATED_GPU, native
from biasloss_ext.ops.registry import families
from biasloss_ext.version import __version__


def info() -> None:
    """Show versions, build and devices, and for each op which backends can run here, or why not."""
    print(report())


def report() -> str:
    """The text of ``biasloss info``."""
    lines = [
        f"biasloss_ext {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {_triton_version()}",
        f"threads {torch.get_num_threads()}, {platform.machine()}",
        *_build(),
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        devices.append(torch.device("cuda"))
    for device in devices:
        lines += ["", _device_name(device)]
        for name, ops in families().items():
            op = ops[0].name
            lines.append(f"  {name}: auto takes {choose('auto', device, op)}" if _present(device) else f"  {name}")
            for backend in BACKENDS:
                reason = why_not(backend, device, op) if _present(device) else _absent(backend, device, op)
                lines.append(f"    {backend:<10} {'can run' if reason is None else f'no: {reason}'}")
    return "\n".join(lines)


def _build() -> list[str]:
    built = native()
    if built.problem is not None:
        return [f"compiled kernels: no, {built.problem}"]
    if SIMULATED_GPU is not None:
        return [f"simulated GPU: {SIMULATED_GPU}; CPU tensors stand in for a GPU's"]
    facts = built.build
    cuda = f"CUDA {facts['cuda']} for {facts['cuda_architectures']}" if facts["cuda"] else "no CUDA kernels"
    return [
        f"compiled kernels: built against torch {facts['torch']} by {facts['compiler']}, {cuda}",
        f"CPU kernels: {facts['cpu_variant_in_use']} of {facts['cpu_variants'].replace(';', ', ')}; int8: "
        f"{facts.get('cpu_int8') or 'no, it needs AVX2'}",
    ]


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    from importlib.metadata import version

    return version("triton")


def _present(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.is_available()


def _absent(backend: str, device: torch.device, op: str) -> str:
    return why_not(backend, device, op) or "torch finds no CUDA GPU"


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return f"{device}: {torch.cuda.get_device_name(device)}" if _present(device) else "cuda: no GPU here"
