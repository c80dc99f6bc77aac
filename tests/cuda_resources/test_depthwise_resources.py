"""Registers, spills and vector loads of the compiled depthwise kernels."""

from __future__ import annotations

import pytest

from tests.cuda_resources import disassembly
from tests.cuda_resources.limits import PARAMETERS

# Registers a thread, by direction and kernel: what leaves room for 3, 2 and 1 blocks of 256 threads.
REGISTERS = {
    **{("forward", kernel): 80 for kernel in (3, 5)},
    ("forward", 7): 128,
    **{("backward", kernel): 128 for kernel in (3, 5)},
    ("backward", 7): 255,
}
DTYPES = ("float", "bfloat16")
EXPECTED = {
    (f"depthwise_{direction}_kernel, {kernel} by {kernel}, stride {stride}", dtype): limit
    for (direction, kernel), limit in REGISTERS.items()
    for stride in (1, 2)
    for dtype in DTYPES
}


@pytest.fixture(scope="module", params=PARAMETERS)
def kernels(request: pytest.FixtureRequest) -> dict[tuple[str, str], disassembly.Kernel]:
    nvcc = disassembly.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH, nor named by NVCC or CUDA_HOME")
    cuobjdump, nvdisasm = (disassembly.find_tool(name) for name in ("cuobjdump", "nvdisasm"))
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("cuobjdump and nvdisasm come with CUDA or with the triton package; neither has them here")
    cubin = disassembly.compile_for(request.param, nvcc, "instantiate_depthwise.cu")
    return {(k.name, k.dtype): k for k in disassembly.kernels_in(cubin, cuobjdump, nvdisasm)}


def test_registers_and_spills(kernels: dict[tuple[str, str], disassembly.Kernel]) -> None:
    assert set(kernels) == set(EXPECTED)
    for key, kernel in kernels.items():
        assert kernel.registers <= EXPECTED[key], f"{key}: {kernel.registers} registers"
        spills = kernel.stack + kernel.local
        assert spills == 0 and not kernel.has(r"\b(LDL|STL)\b"), f"{key} spills {spills} bytes"


def test_vector_loads_are_in_flight_together(kernels: dict[tuple[str, str], disassembly.Kernel]) -> None:
    """Two pixels at a time come into shared memory; the backward pass reads the gradient and y of both."""
    for (name, dtype), kernel in kernels.items():
        wanted = 2 if "forward" in name else 4
        loads = sum(1 for line in kernel.lines if disassembly.is_vector_load(line))
        assert loads >= wanted, f"{name} of {dtype}: {loads} loads of 16 bytes"
