"""SyncBatchNorm in fused layers: two gloo processes on CPUs are one process with the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from biasloss_ext import accelerate
from biasloss_ext.models import skipblocknet_xs
from tests.nn import lookalikes
from tests.nn.blocks import randomize

RANKS = 2
SHARES = (slice(0, 3), slice(3, 4))  # of the batch: not alike


def lookalike() -> nn.Module:
    """Blocks of other libraries, with attentions and without expansion, a bias, and a normalization that stands alone."""
    model = nn.Sequential(
        lookalikes.Conv2dNormActivation(3, 16, 3, 2),
        lookalikes.TorchvisionV2(16, 16, 16),
        lookalikes.TorchvisionV2(16, 48, 16),
        lookalikes.TorchvisionV3(16, 40, 24, 5, 2),
        lookalikes.MBConv(24, 48),
        nn.BatchNorm2d(24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    model[1].conv[0][0].bias = nn.Parameter(torch.randn(16))
    return model


MODELS = {"lookalikes": lookalike, "SkipblockNet": lambda: skipblocknet_xs(num_classes=10, drop_rate=0.0)}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]()
    randomize(model, torch.Generator().manual_seed(0))
    model.double().train()
    for module in model.modules():
        if isinstance(module, lookalikes.StochasticDepth):
            module.eval()  # nothing at random
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=generator)
    return images, torch.randn(4, 10, dtype=torch.float64, generator=generator)


def trained(model: nn.Module, images: Tensor, target: Tensor) -> list[Tensor]:
    """What two steps leave; the loss is the sum over this part of the batch over the size of the whole."""
    outputs = []
    for _ in range(2):
        model.zero_grad()
        out = model(images)
        ((out - target).square().sum() / len(batch()[0])).backward()
        if dist.is_initialized():  # DistributedDataParallel has no SyncBatchNorm on CPUs
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        outputs.append(out.detach())
    return outputs + [p.grad.clone() for p in model.parameters()] + [b.double() for b in model.buffers()]  # type: ignore[union-attr]


def _rank(rank: int, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(made(name))
        accelerate(model)
        images, target = (t[SHARES[rank]] for t in batch())
        torch.save(trained(model, images, target), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one_with_the_whole_batch(name: str, tmp_path: Path) -> None:
    mp.spawn(_rank, (name, tmp_path), nprocs=RANKS)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    expected = trained(made(name), *batch())
    for index, truth in enumerate(expected):
        found = [of_rank[index] for of_rank in of_ranks]
        whole: Any = torch.cat(found) if index < 2 else found[0]
        torch.testing.assert_close(whole, truth, rtol=1e-7, atol=1e-7 * max(truth.abs().max().item(), 1.0))
        if index >= 2:
            torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_alone_and_in_evaluation_it_is_a_batch_norm() -> None:
    plain = made("lookalikes")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    accelerate(model)
    images, _ = batch()
    torch.testing.assert_close(model(images), plain(images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-9, atol=1e-9)
