"""Compiles a launch for GPUs that are not here, and reads from the machine code and the PTX what it costs.

The launchers themselves choose the kernels' arguments: `launches_of` notes what they launch, and the same specialization that
Triton's launcher would take is compiled for each architecture.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90, 100)
TYPE_NAMES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
# In PTX, whose loads ptxas takes over one by one: nvdisasm takes as long as the compiler does.
LOAD_OF_16_BYTES = re.compile(
    r"\bld\.global\S*\.v(?:4\.b32|2\.b64)\b|\bcp\.async\.cg\.\S+ \[[^]]+\], \[[^]]+\], 0x10\b"
)
DIVISIBLE_BY_16 = [["tt.divisibility", 16]]
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel and everything that it is launched with, by name."""

    kernel: Any
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel, with the module that defines it: "pointwise.forward_kernel"."""
        return ".".join((*self.kernel.__module__.split(".")[-2:-1], self.kernel.__name__))

    def kind(self) -> tuple[Any, ...]:
        """What the compiled code depends on, but for sizes."""
        constants = tuple((p.name, str(self.arguments[p.name])) for p in self.kernel.params if p.is_constexpr)
        return self.name, constants, tuple(self.arguments[p.name] is None for p in self.kernel.params)

    def source(self) -> ASTSource:
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
                signature[parameter.name], constants[index,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPE_NAMES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    attributes[index,] = DIVISIBLE_BY_16
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if specialized and value % 16 == 0:
                    attributes[index,] = DIVISIBLE_BY_16
            else:
                signature[parameter.name] = parameter.annotation_type or "fp32"
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)

    def options(self) -> dict[str, Any]:
        return {name: self.arguments[name] for name in OPTIONS if name in self.arguments}


@contextmanager
def recording() -> Any:
    """Launches of any Triton kernel are noted instead of made."""
    found: list[KernelLaunch] = []

    def run(kernel: JITFunction, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        found.append(KernelLaunch(kernel, {**dict(zip(names, values, strict=False)), **named}))

    with mock.patch.object(JITFunction, "run", run):
        yield found


def launches_of(call: Callable[[], Any]) -> list[KernelLaunch]:
    """One of each kind that ``call`` launches."""
    with recording() as found:
        call()
    return list({launch.kind(): launch for launch in found}.values())


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    local: int
    shared: int
    loads_of_16_bytes: int


def compile_launch(launch: KernelLaunch, capability: int) -> Any:
    return triton.compile(launch.source(), target=GPUTarget("cuda", capability, 32), options=launch.options())


def ttgir_of(launch: KernelLaunch, capability: int) -> str:
    """The kernel after the last pass on tiles, where it is known which thread holds what, in a third of a compilation's time."""
    source = launch.source()
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options({**launch.options(), **source.parse_options()})
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": target, **options.__dict__}
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
    return str(module)


def resources_of(compiled: Any, folder: Path) -> Resources:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
    assert usage is not None
    registers, stack, shared, local = map(int, usage.groups())
    loads = len(LOAD_OF_16_BYTES.findall(compiled.asm["ptx"]))
    return Resources(registers, stack, local, max(shared, compiled.metadata.shared), loads)


def _tool(name: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
