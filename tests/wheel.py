"""The wheel as a stranger installs it, beside several releases of Python and torch: ``python -m tests.wheel dist/*.whl``.

Every pair gets an environment with torch, its dependencies and the wheel alone, where `wheel_user.py` runs without a compiler on
the PATH. ``--suite`` also runs the tests of the loss, the ops and the blocks there: the stable ABI's promise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PAIRS = ("3.10:torch==2.11.0", "3.13:torch")
ROOT = Path(__file__).parent.parent
USER = Path(__file__).parent / "wheel_user.py"
OF_LOSS = ("test_loss.py", "test_tracing.py", "test_features.py", "test_distributed.py")
OF_BLOCKS = (
    "nn/test_fused_block.py",
    "nn/test_fused_modes.py",
    "nn/test_batch_norm_modules.py",
    "nn/test_depthwise_conv.py",
)
OF_OPS = tuple(f"ops/{path.name}" for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")))
SUITE = (*OF_LOSS, *OF_BLOCKS, *(name for name in OF_OPS if name != "ops/test_triton_interpreter.py"))
SUITE_NEEDS = ("pytest", "hypothesis", "pytest-benchmark")


def interpreter_of(version: str) -> str:
    """A Python that runs: `python3.10` on the PATH, or one of pyenv's, whose shim on the PATH runs the active versions alone."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
            return candidate
    sys.exit(f"there is no Python {version} that runs: install it, or name other pairs with --beside")


def uv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", "-q", *arguments], check=True)


def install(wheel: Path, pair: str, environment: Path) -> str:
    """The interpreter of a fresh environment with torch and the wheel."""
    python, torch = pair.split(":")
    uv("venv", "--python", interpreter_of(python), str(environment))
    interpreter = str(environment / "bin" / "python")
    uv("pip", "install", "--python", interpreter, torch, str(wheel))
    return interpreter


def use(interpreter: str, empty: Path) -> None:
    """Run `wheel_user.py` on the installed package: -I keeps this source tree off its path."""
    variables = {"PATH": str(empty), "HOME": str(empty)}
    subprocess.run([interpreter, "-I", str(USER)], env=variables, cwd=empty, check=True)


def run_suite(interpreter: str, empty: Path) -> None:
    """Run the tests from a folder without the source tree, so that they see the wheel."""
    uv("pip", "install", "--python", interpreter, *SUITE_NEEDS)
    (empty / "tests").symlink_to(ROOT / "tests")
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(empty)]
    files = [f"tests/{name}" for name in SUITE]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([interpreter, "-m", "pytest", *options, *files], env=variables, cwd=empty, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--beside", nargs="+", default=PAIRS, metavar="PYTHON:TORCH", help="default: %(default)s")
    parser.add_argument("--suite", action="store_true", help="run the tests too")
    arguments = parser.parse_args()
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    for pair in arguments.beside:
        # Not in /tmp, which can be another disk than uv's cache: torch and NVIDIA's libraries, 5 GB, are then linked, not copied.
        with tempfile.TemporaryDirectory(dir=build) as folder:
            empty = Path(folder) / "empty"
            empty.mkdir()
            interpreter = install(arguments.wheel.resolve(), pair, Path(folder) / "environment")
            use(interpreter, empty)
            if arguments.suite:
                run_suite(interpreter, empty)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"the wheel does not pass: exit code {error.returncode} of {' '.join(error.cmd[:6])}")
