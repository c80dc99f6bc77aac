"""Builds the simulator, on demand: ninja rebuilds what changed, pytest imports the result."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODULE = "biasloss_cudasim"

FLAGS = "-std=c++17 -g1 -fPIC -fvisibility=hidden -DCUDASIM -Wall -Wextra -Werror -Wno-unknown-pragmas"
SOURCES = ("module", "bind_self_test", "fiber", "scheduler", "shared_memory", "types")
# Kernels are templates that inline deeply: compiling them takes longer than running them.
PLAIN = "-O1"
SANITIZE = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


def ninja() -> str:
    """The ninja of the Python package, or one on the PATH."""
    try:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("the simulator is built with ninja: pip install ninja") from None
        return found


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run_ninja(folder: Path, rules: str) -> None:
    jobs = os.environ.get("MAX_JOBS", "2")
    # One build at a time: several test processes may want the same.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run([ninja(), "-f", rules, f"-j{jobs}"], cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the simulator does not compile:\n{result.stdout}{result.stderr}")


def build(sanitize: bool = False) -> Path:
    """Returns the path of the up-to-date extension module."""
    import pybind11

    folder = ROOT / "build" / ("cudasim-sanitized" if sanitize else "cudasim")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = " ".join([FLAGS, SANITIZE if sanitize else PLAIN, *(f"-I{path}" for path in includes)])
    sources = [HERE / f"{name}.cpp" for name in SOURCES]
    lines = [
        "rule compile",
        f"  command = g++ {flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared {SANITIZE if sanitize else PLAIN} $in -o $out",
        *(f"build {source.stem}.o: compile {source}" for source in sources),
        f"build {library.name}: link " + " ".join(f"{source.stem}.o" for source in sources),
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    run_ninja(folder, "build.ninja")
    return library


def load(sanitize: bool = False) -> ModuleType:
    """The simulator as a Python module."""
    path = build(sanitize)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return module


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv))
