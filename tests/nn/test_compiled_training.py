"""Training steps of accelerated models: compiled, several of them, and with parameters in channels_last memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from biasloss_ext import accelerate
from biasloss_ext.nn import FusedInvertedResidual, FusedSkipBlock
from biasloss_ext.nn.fused_wrapper import FusedBlock
from tests.nn import lookalikes
from tests.nn.blocks import randomize


class Skipping(nn.Module):
    """The two kinds of blocks of this package, the second over the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FusedInvertedResidual(3, 12, 8, 3, 2, True), FusedSkipBlock(3, 8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x, self.first(x))


# By what is special about them: a block without an expansion, gates, normalizations that hold their activation, skips.
MODELS = {
    "MobileNetV2": lambda: nn.Sequential(
        lookalikes.Conv2dNormActivation(3, 8, 3, 2),
        lookalikes.TorchvisionV2(8, 8, 8),
        lookalikes.TorchvisionV2(8, 24, 8),
    ),
    "MobileNetV3": lambda: nn.Sequential(lookalikes.TorchvisionV3(3, 16, 8, 5, 2), lookalikes.TorchvisionV3(8, 8, 8)),
    "timm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1),
        lookalikes.BatchNormAct2d(8, nn.SiLU()),
        lookalikes.TimmDepthwiseSeparable(8, 8),
        lookalikes.TimmInvertedResidual(8, 16, 8),
    ),
    "SkipblockNet": Skipping,
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]()
    randomize(model, torch.Generator().manual_seed(0))
    report = accelerate(model)
    assert not report.left, report
    fused = (FusedBlock, FusedInvertedResidual)
    assert any(isinstance(module, fused) for module in model.modules())
    return model.train()


def train(run: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[Tensor]:
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    out = run(images)
    out.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    optimizer.step()
    return [out.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_are_those_of_eager_mode(name: str) -> None:
    """The second and third as the first: no running statistic may become part of a step's graph."""
    torch._dynamo.reset()
    model = model_of(name)
    eager = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (model, eager)]
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(3):
        ours = train(compiled, model, optimizers[0], seed)
        expected = train(eager, eager, optimizers[1], seed)
        for found, truth in zip(ours, expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
        for buffer_name, buffer in model.named_buffers():
            assert not buffer.requires_grad, buffer_name
            assert buffer.grad_fn is None, buffer_name
    twin = copy.deepcopy(model).eval()
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(twin(images), model.eval()(images))


def test_compiled_steps_with_constant_statistics() -> None:
    """Fine-tuning with frozen normalizations, some of them and all."""
    torch._dynamo.reset()
    for frozen in (slice(1, 2), slice(None)):
        model = model_of("MobileNetV2")
        for module in list(model.children())[frozen]:
            module.eval()
        eager = copy.deepcopy(model)
        optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (model, eager)]
        compiled = torch.compile(model, backend="aot_eager")
        for seed in range(2):
            pairs = (train(compiled, model, optimizers[0], seed), train(eager, eager, optimizers[1], seed))
            for found, truth in zip(*pairs, strict=True):
                torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_the_strides_of_their_parameters(name: str, layout: str) -> None:
    model = model_of(name).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    model(torch.randn(2, 3, 12, 12)).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), parameter_name
        assert parameter.grad.dtype == parameter.dtype, parameter_name


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)
    dist.destroy_process_group()


@pytest.mark.parametrize("as_views", [False, True])
def test_distributed_training_in_channels_last_takes_gradients_as_they_come(one_process: None, as_views: bool) -> None:
    model = model_of("MobileNetV3").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_views)
    images = torch.randn(2, 3, 12, 12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            wrapped(images).square().mean().backward()
    assert [str(w.message) for w in caught if "strides" in str(w.message)] == []
    for _ in range(2):
        alone(images).square().mean().backward()
    for found, truth in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, truth.grad)


def test_a_compiled_block_runs_on_the_fused_ops() -> None:
    targets: list[str] = []

    def noting(graph: torch.fx.GraphModule, _: Any) -> Any:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                targets.extend(str(node.target) for node in module.graph.nodes)
        return graph.forward

    block = FusedInvertedResidual(8, 16, 8, 3)
    torch.compile(block, fullgraph=True, backend=noting)(torch.randn(2, 8, 6, 6))
    assert any("biasloss_ext" in target for target in targets), targets
