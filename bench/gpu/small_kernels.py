"""Every GPU kernel on a few shapes, for compute-sanitizer and Nsight Compute: ``python -m bench.gpu.small_kernels``."""

from __future__ import annotations

import torch

from bench.gpu import arguments, op_calls
from bench.gpu.op_calls import Shape
from biasloss_ext.ops import backends
from biasloss_ext.ops.registry import OPS

SMALL = (Shape(2, 5, 6, 3, 3, 1, 7), Shape(3, 65, 24, 9, 5, 2, 33), Shape(2, 24, 40, 14, 3, 2, 100))
LARGE = (Shape(64, 240, 40, 28, 5, 1, 1000), Shape(64, 64, 24, 112, 3, 2, 1000))
TINY = SMALL[:1]


def run(given: arguments.Arguments, backend: str, large: bool) -> int:
    """How many calls were made."""
    shapes = TINY if given.tiny else LARGE if large else SMALL
    made = 0
    for shape in shapes:
        for dtype in (torch.bfloat16,) if large or given.tiny else (torch.float32, torch.bfloat16):
            for name, call in op_calls.calls(shape, dtype):
                op = OPS[name]
                if backends.why_not(backend, given.device, name) is None:
                    here = call.to(lambda tensor: tensor.to(given.device))
                    op(*here.arguments, backend=backend, **here.options)
                    made += 1
    if given.device.type == "cuda":
        torch.cuda.synchronize(given.device)
    return made


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--large", action="store_true", help="two blocks of the network")
    parser.add_argument("--backends", default="cuda,triton", help="by commas")
    given, others = arguments.parsed(parser)
    made = {backend: run(given, backend, others.large) for backend in others.backends.split(",")}
    given.save(made)
    print(", ".join(f"{backend}: {number} calls" for backend, number in made.items()))
    if not all(made.values()):
        raise SystemExit("a backend ran nothing: see biasloss info")


if __name__ == "__main__":
    main()
