"""Every Triton kernel, compiled ahead of time for launches that training makes: no spills, few registers, 16-byte loads, no race.

`limits.py` measures the limits, one table a version of triton. Channels that are no multiple of 16, as most are here, must not
cost the kernels their 16-byte loads; copies to shared memory of 16 bytes count as such. Under a triton without a table
registers and loads have no limits.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

import triton
from triton.runtime.jit import JITFunction

import biasloss_ext.ops
from tests.triton_resources.ahead_of_time import CAPABILITIES, compile_launch, launches_of, resources_of
from tests.triton_resources.limits import FOLDER, LAUNCHES, Limit, limits, table_of
from tests.triton_resources.races import hazards

LARGEST_FRAME = 24  # bytes: a pair of registers once a tile, or a few scalars of a last program outside its loops
NO_LIMIT = Limit(255, 0)
EACH_CAPABILITY = [
    pytest.param(capability, marks=() if capability == 100 else pytest.mark.thorough, id=f"sm_{capability}")
    for capability in CAPABILITIES
]
VERSIONS = sorted(path.stem.removeprefix("triton-") for path in FOLDER.glob("triton-*.csv"))


def table() -> dict[tuple[str, str], Limit] | None:
    return limits(triton.__version__) if table_of(triton.__version__).exists() else None


@pytest.mark.parametrize("capability", EACH_CAPABILITY)
@pytest.mark.parametrize("name", LAUNCHES)
def test_resources(name: str, capability: int, tmp_path: Path) -> None:
    found, launches = table(), launches_of(LAUNCHES[name])
    if found is not None:
        assert {launch.name for launch in launches} == {kernel for own, kernel in found if own == name}
    problems = []
    for launch in launches:
        limit = NO_LIMIT if found is None else found[name, launch.name]
        compiled = compile_launch(launch, capability)
        used = resources_of(compiled, tmp_path)
        if (
            used.stack > LARGEST_FRAME
            or used.local
            or used.registers > limit.registers
            or used.loads_of_16_bytes < limit.loads_of_16_bytes
        ):
            problems.append(f"{launch.name}: {used}, {limit}")
        problems += [f"{launch.name}: {hazard}" for hazard in hazards(compiled.asm["ttgir"])]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_table_has_the_launches_and_no_others(version: str) -> None:
    assert {launch for launch, _ in limits(version)} == LAUNCHES.keys()


def test_the_oldest_and_the_newest_triton_have_tables() -> None:
    assert {"3.6.0", "3.7.1"} <= set(VERSIONS)
    if table() is None:
        pytest.skip(f"no limits for triton {triton.__version__}; python -m tests.triton_resources.limits writes them")


def test_every_kernel_is_launched() -> None:
    """A kernel that no launch above takes would be compiled by nobody before a user does."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(biasloss_ext.ops.__path__, "biasloss_ext.ops.")
        if "triton" in module.name
    ]
    own = {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, JITFunction) and value.__module__ == module.__name__
    }
    launched = {launch.name.split(".")[-1] for call in LAUNCHES.values() for launch in launches_of(call)}
    assert own == launched
