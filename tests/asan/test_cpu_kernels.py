"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch: a program of their own.

To add a family of kernels: a .cpp file beside this one that calls them, its function in cases.h and main.cpp, and the
*_simd.cpp files it needs in KERNELS.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = (
    "batch_norm/batch_norm_simd.cpp",
    "bias_loss/lanes_simd.cpp",
    "bias_loss/rows_simd.cpp",
    "channel_gram/gram_simd.cpp",
    "depthwise/plain_simd.cpp",
    "depthwise/rows_simd.cpp",
    "expand_depthwise/activated_simd.cpp",
    "expand_depthwise/product_simd.cpp",
    "feature_variance/moments_simd.cpp",
    "pointwise/backward_simd.cpp",
    "pointwise/forward_simd.cpp",
    "pool_variance/pool_variance_simd.cpp",
    "squeeze_excite/squeeze_excite_simd.cpp",
)
# Without optimization: what is inlined takes the compiler three times as long to guard.
FLAGS = "-std=c++20 -O0 -g1 -Wall -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=undefined"
INT8 = {"avx2": "-march=x86-64-v3", "avx512vnni": "-march=x86-64-v4 -mavx512vnni"}


def build() -> Path:
    """The up-to-date program: ninja rebuilds what changed."""
    ninja = pytest.importorskip("ninja")
    folder = ROOT / "build" / "asan"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(HERE.glob("*.cpp")), *(ROOT / "csrc" / name for name in KERNELS)]
    copies = [(f"{source.parent.name}_{source.stem}.o", source, "") for source in sources]
    if platform.machine() == "x86_64":
        on_bytes = ROOT / "csrc" / "quantized" / "kernels_int8.cpp"
        copies += [(f"{isa}_int8.o", on_bytes, f"{flags} -DBIASLOSS_ISA={isa}") for isa, flags in INT8.items()]
    lines = [
        "rule compile",
        f"  command = g++ {FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ {FLAGS} $in -o $out",
        *(f"build {target}: compile {source}\n  flags = {flags}" for target, source, flags in copies),
        "build kernels: link " + " ".join(target for target, _, _ in copies),
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-j2"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "kernels"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_stay_within_their_memory() -> None:
    result = subprocess.run([build()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
