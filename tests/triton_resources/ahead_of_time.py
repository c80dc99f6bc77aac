"""Compiles a launch for GPUs that are not here, and reads from the machine code and the PTX what it costs.

The launchers themselves choose the kernels' arguments: a `Recorder` stands in for the kernel, notes what it is launched with,
and the same specialisation that Triton's launcher would take is compiled for each architecture.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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


@dataclass
class Recorder:
    """Has the launch syntax of a kernel, and launches nothing."""

    kernel: Any
    launches: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **meta: Any) -> None:
            names = [parameter.name for parameter in self.kernel.params]
            self.launches.append({**dict(zip(names, arguments, strict=False)), **meta, "num_warps": num_warps})

        return launch


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    local: int
    shared: int
    loads_of_16_bytes: int


def compile_launch(kernel: Any, launch: dict[str, Any], capability: int) -> Any:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[index,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPE_NAMES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[index,] = DIVISIBLE_BY_16
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[index,] = DIVISIBLE_BY_16
        else:
            signature[parameter.name] = parameter.annotation_type or "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: launch[name] for name in ("num_warps", "num_stages", "maxnreg") if name in launch}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


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
