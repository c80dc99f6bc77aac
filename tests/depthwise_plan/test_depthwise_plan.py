"""What the plans of the CUDA depthwise kernels read, over the network's shapes at batch 256: counted, not measured.

Run as a program, this prints the table.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from biasloss_ext.models import skipblocknet_m

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SAMPLES = 256
SHARED_BYTES = 48 << 10  # a block's without asking for more
STATIC_BYTES = {"forward": 1040, "backward": 3088}  # of the kernels, as nvcc reports them


@dataclass(frozen=True)
class Shape:
    channels: int
    size: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return f"{self.channels} x {self.size} x {self.size}, k{self.kernel} s{self.stride}"


@dataclass(frozen=True)
class Plan:
    direction: str
    cut: str  # slab, rows and columns of a tile
    read: float
    written: float
    blocks: int
    resident: int
    shared_bytes: int


def network_shapes() -> list[Shape]:
    """Inputs of the network's depthwise convolutions."""
    found: list[Shape] = []

    def note(conv: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        shape = Shape(conv.in_channels, inputs[0].shape[2], int(conv.kernel_size[0]), int(conv.stride[0]))
        if shape not in found:
            found.append(shape)

    with torch.device("meta"):
        network = skipblocknet_m().eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.register_forward_hook(note)
        network(torch.empty(1, 3, 224, 224))
    return found


def plans(shapes: list[Shape], folder: Path) -> list[list[Plan]]:
    """Forward and backward plan of each shape."""
    program = folder / "reads"
    includes = [f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests" / "cudasim")]
    source = [str(HERE / "reads.cpp"), str(ROOT / "tests" / "cudasim" / "types.cpp")]
    flags = ["-std=c++17", "-O1", "-DCUDASIM", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run(
        ["g++", *flags, "-ffunction-sections", "-Wl,--gc-sections", *includes, *source, "-o", str(program)], check=True
    )
    lines = "".join(f"{SAMPLES} {s.channels} {s.size} {s.kernel} {s.stride}\n" for s in shapes)
    output = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True).stdout
    found = []
    for line in output.splitlines():
        direction, cut, read, written, *counts = line.split()
        found.append(Plan(direction, cut, float(read), float(written), *map(int, counts)))
    return [found[i : i + 2] for i in range(0, len(found), 2)]


def test_maps_are_read_little_more_than_once_by_blocks_that_run_at_once(tmp_path: Path) -> None:
    of_network = network_shapes()
    assert len(of_network) >= 14
    others = [Shape(72, 56, 7, 1), Shape(72, 56, 7, 2), Shape(1000, 1, 3, 1), Shape(3, 511, 5, 2)]
    shapes = [*of_network, *others]
    for shape, both in zip(shapes, plans(shapes, tmp_path), strict=True):
        for plan in both:
            assert plan.blocks <= plan.resident, (shape, plan)
            assert plan.shared_bytes + STATIC_BYTES[plan.direction] <= SHARED_BYTES, (shape, plan)
            if shape in of_network:
                assert 1 <= plan.read <= 1.35, (shape, plan)
                assert plan.written <= 1.6, (shape, plan)


def main(folder: Path) -> None:
    shapes = network_shapes()
    for shape, both in zip(shapes, plans(shapes, folder), strict=True):
        cells = [f"{p.cut.replace('x', ' x ')} | {p.read:.2f} | {p.written:.2f}" for p in both]
        print(f"| {shape} | {' | '.join(cells)} |")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
