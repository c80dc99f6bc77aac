"""Two gloo processes: extrema over both ranks by one all-reduce, and DistributedDataParallel."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from biasloss_ext import FeatureTap, FusedBiasLoss

RANKS = 2


def _worker(rank: int, body: Callable[[int, Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        torch.save(body(rank, folder), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(body: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    mp.spawn(_worker, (body, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def whole_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(8, 1, generator=generator) + 0.3
    features = torch.randn(8, 50, generator=generator) * scale
    return features, torch.randn(8, 5, generator=generator), torch.randint(5, (8,), generator=generator)


def _steps(rank: int, folder: Path) -> Any:
    results = []
    for backend in ("cpu", "reference"):
        for given in ("features", "variance"):
            loss_fn = FusedBiasLoss(process_group=dist.group.WORLD, reduction="none", backend=backend)
            features, output, target = (t[rank * 4 : rank * 4 + 4] for t in whole_batch())
            output = output.clone().requires_grad_()
            if given == "variance":
                loss = loss_fn(None, output, target, variance=features.var(1))
            else:
                loss = loss_fn(features, output, target)
            (gradient,) = torch.autograd.grad(loss.sum(), output)
            results.append((loss.detach(), gradient, loss_fn.running_min))
    return results


def test_group_gives_what_one_process_gives(tmp_path: Path) -> None:
    first, second = run(_steps, tmp_path)
    features, output, target = whole_batch()
    output.requires_grad_()
    loss_fn = FusedBiasLoss(reduction="none")
    loss = loss_fn(features, output, target)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    for (loss_a, gradient_a, minimum_a), (loss_b, gradient_b, minimum_b) in zip(first, second, strict=True):
        torch.testing.assert_close(torch.cat((loss_a, loss_b)), loss.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.cat((gradient_a, gradient_b)), gradient, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(minimum_a, loss_fn.running_min)
        assert torch.equal(minimum_a, minimum_b)


def _count_collectives(rank: int, folder: Path) -> Any:
    calls: list[int] = []
    original = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        calls.append(tensor.numel())
        return original(tensor, *arguments, **keywords)

    dist.all_reduce = counting
    features, output, target = (t[rank * 4 : rank * 4 + 4] for t in whole_batch())
    loss_fn = FusedBiasLoss(process_group=dist.group.WORLD)
    loss_fn(features, output, target)
    loss_fn.eval()
    loss_fn(features, output, target)
    return calls


def test_one_all_reduce_in_training_and_none_in_evaluation(tmp_path: Path) -> None:
    assert run(_count_collectives, tmp_path) == [[2], [2]]


def _uneven(rank: int, folder: Path) -> Any:
    """Rank 1 has an empty batch, then rank 0 a NaN."""
    features, output, target = whole_batch()
    count = 8 if rank == 0 else 0
    loss_fn = FusedBiasLoss(process_group=dist.group.WORLD, reduction="sum")
    empty = loss_fn(features[:count], output[:count], target[:count])
    minimum = loss_fn.running_min.item()
    features = features * 0.1
    if rank == 0:
        features[0, 0] = math.nan
    poisoned = loss_fn(features, output, target)
    return empty.item(), minimum, poisoned.isnan().item(), loss_fn.running_min.item()


def test_empty_rank_and_non_finite_rank(tmp_path: Path) -> None:
    first, second = run(_uneven, tmp_path)
    alone = FusedBiasLoss(reduction="sum")
    assert first[0] == pytest.approx(alone(*whole_batch()).item(), rel=1e-6)
    assert second[0] == 0
    for result in (first, second):  # every rank skips the step, and no rank's minimum moves
        assert result[1] == pytest.approx(alone.running_min.item(), rel=1e-6)
        assert result[2]
        assert result[3] == result[1]


def _distributed_model(rank: int, folder: Path) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 20), nn.Tanh(), nn.Linear(20, 5))
    model = DistributedDataParallel(FeatureTap(net, "1"))
    loss_fn = FusedBiasLoss(process_group=dist.group.WORLD)
    features, _, target = (t[rank * 4 : rank * 4 + 4] for t in whole_batch())
    loss_fn(*model(features), target).backward()
    return [parameter.grad for parameter in net.parameters()]


def test_distributed_data_parallel_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    first, second = run(_distributed_model, tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 20), nn.Tanh(), nn.Linear(20, 5))
    features, _, target = whole_batch()
    FusedBiasLoss()(*FeatureTap(net, "1")(features), target).backward()
    for a, b, parameter in zip(first, second, net.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad, rtol=1e-5, atol=1e-7)
        assert torch.equal(a, b)


def _compiled(rank: int, folder: Path) -> Any:
    features, output, target = (t[rank * 4 : rank * 4 + 4] for t in whole_batch())
    loss_fn = FusedBiasLoss(process_group=dist.group.WORLD, reduction="none")
    expected = FusedBiasLoss(process_group=dist.group.WORLD, reduction="none")(features, output, target)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    return (compiled(features, output, target) - expected).abs().max().item()


def test_group_compiles(tmp_path: Path) -> None:
    assert run(_compiled, tmp_path) == [0.0, 0.0]
