"""Every GPU kernel on a few shapes, for compute-sanitizer and Nsight Compute: ``python -m bench.small_kernels``."""

from __future__ import annotations

import argparse

import torch

from biasloss_ext import functional
from biasloss_ext.ops import backends

SMALL = ((2, 5, 3, 3, 7), (9, 65, 4, 4, 33), (40, 24, 7, 7, 100))  # samples, channels, height, width, classes
LARGE = ((256, 960, 7, 7, 1000),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="the shape of ImageNet, once")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    for backend in ("cuda", "triton"):
        reason = backends.why_not(backend, device)
        if reason is not None:
            print(f"{backend} cannot run here: {reason}")
            continue
        for shape in LARGE if arguments.large else SMALL:
            for dtype in (torch.bfloat16,) if arguments.large else (torch.float32, torch.bfloat16):
                for layout in (torch.contiguous_format, torch.channels_last):
                    run(backend, shape, dtype, layout)
        print(f"{backend}: done")


def run(backend: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    *maps, classes = shape
    features = torch.randn(maps, device="cuda").to(dtype, memory_format=layout)
    output = torch.randn(maps[0], classes, device="cuda").to(dtype).requires_grad_()
    target = torch.randint(classes, (maps[0],), device="cuda")
    functional.feature_variance(features, backend=backend)
    functional.bias_loss(features, output, target, backend=backend).loss.backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
