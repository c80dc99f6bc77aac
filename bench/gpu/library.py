"""Stage 1: the library that lies in the package where it loads and has code for this GPU, else one built here."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from bench.gpu import arguments

JOBS = 16
# In a process of its own: a library that was loaded once stays loaded.
CHECK = """
import sys, torch
from biasloss_ext.ops.backends import why_not
reason = why_not("cuda", torch.device(sys.argv[1]))
print("ready" if reason is None else reason)
"""


def why_not(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on ``device`` with the library as it is, or None when they can."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK, device.type], capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it says nothing"]
    return None if lines[-1] == "ready" else lines[-1]


def build(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    asked = {
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "BIASLOSS_CUDA": "1",
        "MAX_JOBS": str(min(JOBS, os.cpu_count() or 1)),
    }
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], env={**os.environ, **asked}, check=True)


def main() -> None:
    given, _ = arguments.parsed(arguments.parser(__doc__))
    reason = why_not(given.device)
    built = reason is not None and given.device.type == "cuda"
    if built:
        print(f"building, since the CUDA kernels cannot run: {reason}", flush=True)
        build(given.device)
        reason = why_not(given.device)
    given.save({"built": built, "problem": reason, "torch": torch.__version__, "python": sys.version.split()[0]})
    subprocess.run([sys.executable, "-c", "from biasloss_ext.info import report; print(report())"], check=True)
    if reason is not None:
        sys.exit(f"the CUDA kernels cannot run: {reason}")
    print("built here" if built else "carried ready-built")


if __name__ == "__main__":
    main()
