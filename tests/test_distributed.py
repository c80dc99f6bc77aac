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
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from biasloss_ext import FeatureTap, FusedBiasLoss
from biasloss_ext.nn import DepthwiseConv2d

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


@pytest.mark.slow
def test_group_compiles(tmp_path: Path) -> None:
    assert run(_compiled, tmp_path) == [0.0, 0.0]


STEPS = 3


def _images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    scale = torch.rand(8, 1, 1, 1, generator=generator) + 0.3
    return torch.randn(8, 4, 9, 7, generator=generator) * scale, torch.randint(5, (8,), generator=generator)


def _network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    features = nn.Sequential(DepthwiseConv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1), nn.Tanh())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, batch: slice) -> Tensor:
    images, target = (t[batch] for t in _images())
    optimizer.zero_grad()
    loss: Tensor = loss_fn(*model(images), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _sharded(rank: int, folder: Path) -> Any:
    """All but the last step; then, in new objects that begin elsewhere, the last one from the checkpoint."""
    batch, options = slice(rank * 4, rank * 4 + 4), StateDictOptions(full_state_dict=True)

    def begin(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, FusedBiasLoss]:
        tap = FeatureTap(_network(seed), "0")
        mesh = init_device_mesh("cpu", (RANKS,))
        fully_shard(tap.get_submodule("0"), mesh=mesh)
        fully_shard(tap, mesh=mesh)
        optimizer = torch.optim.SGD(tap.parameters(), lr=0.5, momentum=0.9)
        return tap, optimizer, FusedBiasLoss(process_group=dist.group.WORLD)

    model, optimizer, loss_fn = begin(0)
    losses = [_step(model, optimizer, loss_fn, batch) for _ in range(STEPS - 1)]
    states = (*get_state_dict(model, optimizer), loss_fn.state_dict())
    names = ("model", "optimizer", "loss")
    checkpoint.save(dict(zip(names, states, strict=True)), checkpoint_id=folder / "checkpoint")

    model, optimizer, loss_fn = begin(1)
    loaded = dict(zip(names, (*get_state_dict(model, optimizer), loss_fn.state_dict()), strict=True))
    checkpoint.load(loaded, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    loss_fn.load_state_dict(loaded["loss"])
    losses.append(_step(model, optimizer, loss_fn, batch))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return losses, dict(get_model_state_dict(model, options=options)), loss_fn.running_min


@pytest.mark.slow
def test_fully_sharded_training_gives_what_one_process_gives(tmp_path: Path) -> None:
    (first, weights, minimum), (second, _, same_minimum) = run(_sharded, tmp_path)
    alone, loss_fn = _network(0), FusedBiasLoss()
    optimizer, tap = torch.optim.SGD(alone.parameters(), lr=0.5, momentum=0.9), FeatureTap(alone, "0")
    losses = [_step(tap, optimizer, loss_fn, slice(None)) for _ in range(STEPS)]
    assert losses[0] != losses[-1]
    averaged = (torch.stack(first) + torch.stack(second)) / 2
    torch.testing.assert_close(averaged, torch.stack(losses), rtol=1e-5, atol=1e-6)
    assert torch.equal(minimum, same_minimum)
    torch.testing.assert_close(minimum, loss_fn.running_min, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights, dict(alone.state_dict()), rtol=1e-5, atol=1e-6)
    alone.load_state_dict(weights)  # which moves into the model that is not wrapped
