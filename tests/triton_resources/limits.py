"""``python -m tests.triton_resources.limits`` measures what each launch costs and writes it down as the limits of this triton.

Each version of triton has its own table, ``limits/triton-<version>.csv``: the most registers that a thread may take and the
fewest 16-byte loads that the PTX must have, over all architectures. Run it beside each version that has a table after kernels
changed, and look at the difference before it is committed: a limit that rises needs a reason.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton

from tests.triton_resources.ahead_of_time import (
    CAPABILITIES,
    KernelLaunch,
    Resources,
    compile_launch,
    launches_of,
    resources_of,
)
from tests.triton_resources.block_launches import BLOCK_LAUNCHES
from tests.triton_resources.loss_launches import LOSS_LAUNCHES

LAUNCHES: dict[str, Callable[[], Any]] = {**LOSS_LAUNCHES, **BLOCK_LAUNCHES}
FOLDER = Path(__file__).parent / "limits"
STEP = 8  # registers, which a GPU allots so many at a time
COLUMNS = ("launch", "kernel", "registers", "loads of 16 bytes")


class Limit(NamedTuple):
    registers: int
    loads_of_16_bytes: int


def table_of(version: str) -> Path:
    return FOLDER / f"triton-{version}.csv"


def limits(version: str) -> dict[tuple[str, str], Limit]:
    """By launch and kernel."""
    with table_of(version).open(newline="") as file:
        return {
            (line["launch"], line["kernel"]): Limit(int(line["registers"]), int(line["loads of 16 bytes"]))
            for line in csv.DictReader(file)
        }


def used_by(launch: KernelLaunch, folder: Path) -> dict[int, Resources]:
    """By architecture."""
    return {capability: resources_of(compile_launch(launch, capability), folder) for capability in CAPABILITIES}


def rounded(registers: int) -> int:
    return -(-registers // STEP) * STEP


def main() -> None:
    measured: dict[tuple[str, str], Limit] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, call in LAUNCHES.items():
            for launch in launches_of(call):
                used = used_by(launch, Path(folder)).values()
                before = measured.get((name, launch.name), Limit(0, 1 << 30))
                measured[name, launch.name] = Limit(
                    max(before.registers, *(rounded(u.registers) for u in used)),
                    min(before.loads_of_16_bytes, *(u.loads_of_16_bytes for u in used)),
                )
            print(name, flush=True)
    FOLDER.mkdir(exist_ok=True)
    with table_of(triton.__version__).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*key, *limit) for key, limit in measured.items())


if __name__ == "__main__":
    main()
