"""Fused models under what training does around them: checkpointing, processes, compilation, export, frozen parts, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from biasloss_ext import FusedBiasLoss
from biasloss_ext.models import skipblocknet_xs
from biasloss_ext.nn import FusedConvNormActivation, FusedHead, FusedInvertedResidual
from biasloss_ext.ops.depthwise import op as depthwise
from tests.nn.blocks import randomize


def pair() -> tuple[nn.Module, nn.Module]:
    """The same network, plain and fused, in float64."""
    torch.manual_seed(0)
    plain = skipblocknet_xs(num_classes=10, return_features="variance", fused=False, drop_rate=0.0)
    randomize(plain, torch.Generator().manual_seed(0))
    fused = skipblocknet_xs(num_classes=10, return_features="variance", fused=True, drop_rate=0.0)
    fused.load_state_dict(plain.state_dict(), strict=True)
    return plain.double(), fused.double()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, count: int = 4) -> dict[str, Tensor]:
    variance, scores = model(images(count))
    FusedBiasLoss()(None, scores, torch.arange(count), variance=variance).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == truth.keys()
    largest = max(value.abs().max().item() for value in truth.values())
    for name, value in truth.items():
        scale = max(value.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_network_with_loss() -> None:
    plain, fused = pair()
    assert_same(gradients(fused), gradients(plain))
    for (name, a), (_, b) in zip(plain.named_buffers(), fused.named_buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_moves_both_ways() -> None:
    plain, fused = pair()
    gradients(fused)
    torch.optim.SGD(fused.parameters(), 0.1).step()
    plain.load_state_dict(fused.state_dict(), strict=True)
    plain.eval(), fused.eval()
    for a, b in zip(plain(images()), fused(images()), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)


def test_frozen_parts() -> None:
    """Some parameters, some normalizations and the input without gradients."""
    plain, fused = pair()
    for model in (plain, fused):
        model.blocks[0].eval()
        for parameter in (*model.first_layer.parameters(), model.blocks[1][0].conv[3].weight):
            parameter.requires_grad_(False)
    assert_same(gradients(fused), gradients(plain))


def test_checkpointed() -> None:
    block = FusedInvertedResidual(8, 24, 8, 3, 1, True)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 8, 9, 9)
    results = []
    for module, call in ((block, block), (twin, lambda t: checkpoint(twin, t, use_reentrant=False))):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compiled_step_is_one_graph() -> None:
    block = FusedInvertedResidual(8, 24, 8, 3, 1, True)
    head = FusedHead(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(), fused=True)
    stem = FusedConvNormActivation(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), fused=True)
    model = nn.ModuleList((stem, block, head))
    twin = copy.deepcopy(model)

    def run(modules: nn.ModuleList, x: Tensor) -> Tensor:
        pooled, variance = modules[2].pool(modules[1](modules[0](x)))  # type: ignore[operator]
        total: Tensor = pooled.square().sum() + variance.sum()
        return total

    x = torch.randn(2, 3, 16, 16)
    expected = run(twin, x)
    expected.backward()
    got = torch.compile(lambda t: run(model, t), fullgraph=True, backend="aot_eager")(x)
    got.backward()
    torch.testing.assert_close(got, expected)
    for (name, a), b in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(b, a)


def test_export_takes_the_plain_layers() -> None:
    model = skipblocknet_xs(num_classes=10, fused=True).eval()
    program = torch.export.export(model, (torch.randn(1, 3, 64, 64),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("biasloss_ext" in target for target in targets)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-3, atol=1e-9)


def _train_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    plain, fused = pair()
    for name, model in (("plain", plain), ("fused", fused)):
        wrapped = DistributedDataParallel(model)
        variance, scores = wrapped(images()[rank * 2 : rank * 2 + 2])
        loss = FusedBiasLoss(process_group=dist.group.WORLD)(
            None, scores, torch.arange(2) + 2 * rank, variance=variance
        )
        loss.backward()
        if rank == 0:
            torch.save({key: p.grad for key, p in model.named_parameters()}, f"{folder}/{name}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(_train_one_rank, (str(tmp_path),), nprocs=2)
    assert_same(torch.load(tmp_path / "fused.pt"), torch.load(tmp_path / "plain.pt"))


def test_a_named_backend_is_not_replaced() -> None:
    x = torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: depthwise has no triton kernels"):
        depthwise.forward(x, torch.randn(4, 1, 3, 3), backend="triton")
