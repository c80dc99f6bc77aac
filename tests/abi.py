"""One wheel, several torch releases: ``python -m tests.abi`` builds beside the torch that runs it, tests beside others.

Every release gets a virtual environment of its own; the tests are those of the loss on a CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("ops/test_bias_loss.py", "ops/test_bias_loss_edge_cases.py", "ops/test_feature_variance.py", "test_loss.py")
TESTS += ("test_tracing.py", "test_features.py", "test_distributed.py")


def run(*command: str, cwd: Path = ROOT) -> None:
    subprocess.run(command, cwd=cwd, check=True)


def build_wheel(folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder))
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_beside(torch: str, wheel: Path, environment: Path, python: str) -> None:
    """Run the tests from a folder without the source tree, so that they see the wheel."""
    interpreter = str(environment / "bin" / "python")
    if not Path(interpreter).exists():
        run(python, "-m", "venv", str(environment))
    run(interpreter, "-m", "pip", "install", "-q", torch, "numpy", "pytest", "hypothesis", "pytest-benchmark")
    run(interpreter, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel))
    with tempfile.TemporaryDirectory() as empty:
        script = (
            f"import torch, sys, pytest; print('torch', torch.__version__); sys.path.insert(0, {str(ROOT / 'tests')!r})"
        )
        files = [str(ROOT / "tests" / name) for name in TESTS]
        options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", empty]
        run(interpreter, "-c", f"{script}; sys.exit(pytest.main({options + files}))", cwd=Path(empty))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the virtual environments")
    parser.add_argument("--torch", nargs="+", default=["torch==2.11.0", "torch"], help="releases to test beside")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "abi", help="where to keep them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        for torch in arguments.torch:
            test_beside(torch, wheel, arguments.environments / torch.replace("==", "-"), arguments.python)


if __name__ == "__main__":
    main()
