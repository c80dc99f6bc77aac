"""Tracing, compiling, exporting, and training in several processes; tests/test_docs.py has ONNX Runtime and OpenVINO."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from biasloss_ext import models
from tests.models.random_weights import random_state


def random_model(**options: object) -> nn.Module:
    model = models.skipblocknet_xs(num_classes=10, **options)
    model.load_state_dict(random_state({key: value.shape for key, value in model.state_dict().items()}))
    return model.eval()


@pytest.mark.slow
def test_compile_without_graph_break() -> None:
    """With the features returned; with their variance it is exported below."""
    model = random_model(return_features="features", drop_rate=0).train()
    images = torch.randn(4, 3, 64, 64)
    target = torch.tensor([1, 5, 9, 0])

    def gradients(forward: nn.Module) -> tuple[Tensor, Tensor, list[Tensor]]:
        extra, scores = forward(images)
        grads = torch.autograd.grad(F.cross_entropy(scores, target), list(model.parameters()))
        return extra.detach(), scores.detach(), list(grads)

    expected = gradients(model)
    torch._dynamo.reset()
    # aot_eager traces forward and backward as the default backend does, and runs them without generating code.
    actual = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(actual, expected)


def test_compiled_model_refuses_small_images() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(random_model(), backend="eager")
    with pytest.raises(ValueError, match="at least 32"):
        compiled(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("return_features", ["none", "variance"])
def test_torch_export(return_features: str) -> None:
    model = random_model(return_features=return_features)
    batch = torch.export.Dim("batch", min=1, max=64)
    height, width = (torch.export.Dim(name, min=33, max=1024) for name in ("height", "width"))
    shapes = ({0: batch, 2: height, 3: width},)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=shapes)
    images = torch.randn(5, 3, 75, 50)
    torch.testing.assert_close(exported.module()(images), model(images))


def test_torch_fx() -> None:
    model = random_model(return_features="features")
    images = torch.randn(1, 3, 75, 50)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))


def test_distributed_data_parallel_returns_the_pair(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = random_model(return_features="features", drop_rate=0).train()
        parallel = DistributedDataParallel(model)
        features, scores = parallel(torch.randn(2, 3, 64, 64))
        (scores.sum() + 0 * features.detach().sum()).backward()
        assert features.shape == (2, model.num_features, 2, 2)
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
