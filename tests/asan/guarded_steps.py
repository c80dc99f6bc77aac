"""Training steps and inference of accelerated networks, for `test_guard_pages.py`."""

from __future__ import annotations

import torch

from biasloss_ext import accelerate, optimize_for_inference
from biasloss_ext.models import skipblocknet_xs
from tests.nn import lookalikes

BATCHES = (((2, 3, 33, 38), torch.contiguous_format), ((1, 3, 40, 41), torch.channels_last))


def networks() -> None:
    torch.manual_seed(0)
    accelerated = lookalikes.network().float()
    accelerate(accelerated)
    for model in (skipblocknet_xs(num_classes=10, small_input=True), accelerated):
        for size, layout in BATCHES:
            images = torch.randn(size).contiguous(memory_format=layout)
            model.train()(images).square().mean().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
            with torch.inference_mode():
                scores = [model.eval()(images), optimize_for_inference(model)(images)]
            assert all(found.isfinite().all() for found in scores)


if __name__ == "__main__":
    networks()
    print("ended")
