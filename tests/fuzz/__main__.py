"""``python -m tests.fuzz --calls 1000000 --seed 1``: calls of all CPU ops with arguments they may not expect."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.calls import Drawing
from tests.fuzz.run import fuzz, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="decides every call, together with its number")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--only", type=int, help="run this call alone, in this process")
    options = parser.parse_args()
    if options.only is not None:
        call = Drawing(options.seed).call(options.only)
        print(call, flush=True)
        print(run(call, options.only) or "nothing found")
        return 0
    start = time.monotonic()
    findings = fuzz(options.seed, options.first, options.calls, show_progress=True)
    print(f"{options.calls} calls in {time.monotonic() - start:.0f} s, seed {options.seed}: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
