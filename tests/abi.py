"""One wheel, several torch releases: ``python -m tests.abi`` builds beside the oldest release, tests beside all of them.

Every release gets a virtual environment of its own; the tests are those of the loss, the ops and the blocks on a CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OF_LOSS = ("test_loss.py", "test_tracing.py", "test_features.py", "test_distributed.py")
OF_BLOCKS = (
    "nn/test_fused_block.py",
    "nn/test_fused_modes.py",
    "nn/test_batch_norm_modules.py",
    "nn/test_depthwise_conv.py",
)
OF_OPS = tuple(f"ops/{path.name}" for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")))
TESTS = (*OF_LOSS, *OF_BLOCKS, *(name for name in OF_OPS if name != "ops/test_triton_interpreter.py"))
BUILD_NEEDS = ("build", "setuptools>=77", "wheel", "ninja", "pybind11")
TEST_NEEDS = ("numpy", "pytest", "hypothesis", "pytest-benchmark")


def run(*command: str, cwd: Path = ROOT) -> None:
    subprocess.run(command, cwd=cwd, check=True)


def environment_of(torch: str, folder: Path, python: str) -> str:
    """The interpreter of the virtual environment of a release, which is made if it is missing."""
    environment = folder / torch.replace("==", "-")
    interpreter = str(environment / "bin" / "python")
    if not Path(interpreter).exists():
        run(python, "-m", "venv", str(environment))
    run(interpreter, "-m", "pip", "install", "-q", torch, *BUILD_NEEDS, *TEST_NEEDS)
    return interpreter


def build_wheel(interpreter: str, folder: Path) -> Path:
    """Built from the source distribution, so that a file which that lacks is missed."""
    run(interpreter, "-m", "build", "--no-isolation", "-o", str(folder))
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_beside(interpreter: str, wheel: Path) -> None:
    """Run the tests from a folder without the source tree, so that they see the wheel."""
    run(interpreter, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel))
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / "tests").symlink_to(ROOT / "tests")
        files = [f"tests/{name}" for name in TESTS]
        options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", empty]
        run(interpreter, "-c", "import torch; print('torch', torch.__version__)")
        run(interpreter, "-m", "pytest", *options, *files, cwd=Path(empty))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the virtual environments")
    parser.add_argument(
        "--torch", nargs="+", default=["torch==2.11.0", "torch"], help="releases to test beside; the first builds"
    )
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "abi", help="where to keep them")
    arguments = parser.parse_args()
    interpreters = [environment_of(torch, arguments.environments, arguments.python) for torch in arguments.torch]
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(interpreters[0], Path(folder))
        for interpreter in interpreters:
            test_beside(interpreter, wheel)


if __name__ == "__main__":
    main()
