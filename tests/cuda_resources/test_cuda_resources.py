"""Registers, spills and vector loads of the compiled CUDA kernels, against the table in limits.py."""

from __future__ import annotations

import pytest

from tests.cuda_resources import disassembly
from tests.cuda_resources.limits import PARAMETERS, REGISTERS, VECTOR_LOADS_IN_FLIGHT


@pytest.fixture(scope="module", params=PARAMETERS)
def kernels(request: pytest.FixtureRequest) -> list[disassembly.Kernel]:
    nvcc = disassembly.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH, nor named by NVCC or CUDA_HOME")
    cuobjdump, nvdisasm = (disassembly.find_tool(name) for name in ("cuobjdump", "nvdisasm"))
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("cuobjdump and nvdisasm come with CUDA or with the triton package; neither has them here")
    return disassembly.kernels_in(disassembly.compile_for(request.param, nvcc), cuobjdump, nvdisasm)


def test_the_table_names_every_kernel(kernels: list[disassembly.Kernel]) -> None:
    assert {(k.name, k.dtype) for k in kernels} == set(REGISTERS)


def test_registers(kernels: list[disassembly.Kernel]) -> None:
    used = {(k.name, k.dtype): k.registers for k in kernels}
    over = {key: (count, REGISTERS[key]) for key, count in used.items() if count > REGISTERS[key]}
    assert not over, f"registers used and allowed: {over}"


def test_nothing_spills(kernels: list[disassembly.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.stack + kernel.local == 0, f"{kernel.name} of {kernel.dtype}: {kernel.stack} bytes of stack"
        assert not kernel.has(r"\b(LDL|STL)\b"), f"{kernel.name} of {kernel.dtype} spills"


def test_vector_loads_are_in_flight_together(kernels: list[disassembly.Kernel]) -> None:
    for kernel in kernels:
        if kernel.name in VECTOR_LOADS_IN_FLIGHT:
            in_flight = kernel.most_vector_loads_in_flight()
            assert in_flight >= VECTOR_LOADS_IN_FLIGHT[kernel.name], f"{kernel.name} of {kernel.dtype}: {in_flight}"


def test_gradients_are_stored_as_vectors(kernels: list[disassembly.Kernel]) -> None:
    for kernel in kernels:
        if kernel.name == "bias_loss_backward_kernel":
            assert kernel.has(r"\bSTG\.E\S*\.128"), kernel.dtype


def test_counting_stops_at_the_first_use() -> None:
    """The counter itself, on a loop written by hand."""
    loop = [
        "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
        "LDG.E.128 R8, [R2.64+0x10]",
        "FADD R0, R9, R1",
        "LDG.E.128 R12, [R2]",
    ]
    assert disassembly.vector_loads_before_use(loop) == 2
    assert disassembly.vector_loads_before_use(["LDG.E R4, [R2.64]", "FADD R0, R4, R1"]) == 0
