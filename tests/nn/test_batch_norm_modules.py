"""The bookkeeping of fused batch normalization against `nn.BatchNorm2d`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext.nn import batch_norm
from biasloss_ext.nn.chain import Chain, Step
from biasloss_ext.nn.fused_chain import fused_chain
from biasloss_ext.ops import maps
from biasloss_ext.ops.library import accumulation_dtype
from tests.runnable import backends_of

BACKENDS = backends_of("batch_norm_apply")
ACTIVATIONS = (lambda u: u, F.relu, F.relu6, F.hardswish, F.silu)


def module_with_history(channels: int, dtype: torch.dtype = torch.float64, **options: object) -> nn.BatchNorm2d:
    torch.manual_seed(channels)
    module = nn.BatchNorm2d(channels, dtype=dtype, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        if module.weight is not None:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
        if module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return module


def map_of(channels: int, dtype: torch.dtype = torch.float64, mean: float = 5.0) -> Tensor:
    torch.manual_seed(channels + 1)
    return maps.channels_last(torch.randn(3, channels, 5, 4, dtype=dtype) * 2 + mean)


def fused(module: nn.BatchNorm2d, y: Tensor, activation: int = 0, backend: str = "auto") -> Tensor:
    """As the layers run it: statistics with the running ones moved, then ``act(BN(y))``."""
    return fused_chain(y, Chain((Step(None, module, activation),)), backend=backend)


def output_and_gradients(out: Tensor, y: Tensor, module: nn.BatchNorm2d, grad: Tensor) -> list[Tensor]:
    leaves = [y, *([] if module.weight is None else [module.weight, module.bias])]
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({}, True),
        ({}, False),
        ({"eps": 1e-3, "momentum": 0.01}, True),
        ({"affine": False}, True),
        ({"affine": False}, False),
        ({"track_running_stats": False}, False),
        ({"track_running_stats": False}, True),
        ({"momentum": None}, True),
    ],
)
def test_forward_and_backward(
    backend: str, activation: int, channels: int, options: dict[str, object], training: bool
) -> None:
    module = module_with_history(channels, **options).train(training)
    plain = copy.deepcopy(module)
    y = map_of(channels)
    for _ in range(3):  # the running statistics of several steps
        y = maps.channels_last(y + 0.5)
        grad = maps.channels_last(torch.randn_like(y))
        here, there = y.clone().requires_grad_(), y.clone().requires_grad_()
        ours = output_and_gradients(fused(module, here, activation, backend), here, module, grad)
        expected = output_and_gradients(ACTIVATIONS[activation](plain(there)), there, plain, grad)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_map", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.1, None])
@torch.no_grad()
def test_running_statistics_keep_their_dtype(
    backend: str, of_map: torch.dtype, dtype: torch.dtype, momentum: float | None
) -> None:
    """Whatever the dtype of the map: an op moves them where it can, the layer where not."""
    module = module_with_history(8, dtype, momentum=momentum)
    exact = copy.deepcopy(module).double()
    rounding = torch.finfo(dtype).eps if dtype.itemsize < 4 else torch.finfo(torch.float32).eps
    for step in range(3):
        y = map_of(8, torch.float64, mean=step).to(of_map)
        fused(module, y, 0, backend)
        exact(y.double())
        for ours, truth in zip(module.buffers(), exact.buffers(), strict=True):
            assert ours.dtype in (dtype, torch.int64)
            torch.testing.assert_close(ours.double(), truth.double(), rtol=2 * rounding, atol=2 * rounding)
    statistics = batch_norm.constant_statistics(module, accumulation_dtype(of_map), backend=backend)
    assert statistics.dtype == torch.float32
    mean, var = module.running_mean.double(), module.running_var.double()
    scale = module.weight.double() / torch.sqrt(var + module.eps)
    truth = torch.stack((mean, var, scale, module.bias.double() - scale * mean))
    torch.testing.assert_close(statistics.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "dtype", "by_the_op"),
    [
        ({}, torch.float32, True),
        ({"momentum": None}, torch.float32, False),
        ({"track_running_stats": False}, torch.float32, False),
        ({}, torch.bfloat16, False),
        ({}, torch.float64, False),
    ],
)
def test_who_moves_the_running_statistics(options: dict[str, object], dtype: torch.dtype, by_the_op: bool) -> None:
    module = module_with_history(4, dtype, **options)
    norm = batch_norm.norm_of(module, torch.float32, 10)
    assert (norm.running is not None) == by_the_op
    assert not norm.frozen
    tracks = module.track_running_stats
    assert batch_norm.norm_of(module.eval(), torch.float32, 10) == batch_norm.Norm(module.eps, tracks)


@torch.no_grad()
def test_what_changes_no_statistics() -> None:
    y = map_of(4)
    for change in ("evaluation", "tracking switched off"):
        module = module_with_history(4)
        if change == "evaluation":
            module.eval()
        else:
            module.track_running_stats = False
        before = copy.deepcopy(module.state_dict())
        fused(module, y)
        batch_norm.update_running(module, maps.statistics_of(y), 60)
        torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)

    for options in ({}, {"momentum": None}):  # moved by the op, and by the layer
        module = module_with_history(4, **options)
        plain = copy.deepcopy(module)
        empty = maps.channels_last(torch.zeros(0, 4, 2, 2, dtype=torch.float64))
        assert fused(module, empty).shape == plain(empty).shape
        torch.testing.assert_close(dict(module.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


@torch.no_grad()
def test_one_value_a_channel() -> None:
    module = module_with_history(4, momentum=None)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        module(torch.zeros(1, 4, 1, 1, dtype=torch.float64))
    module.load_state_dict(before)
    with pytest.raises(
        ValueError, match=r"more than 1 value per channel when training, got input of shape \(1, 4, 1, 1\)"
    ):
        fused(module, maps.channels_last(torch.zeros(1, 4, 1, 1, dtype=torch.float64)))
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


def test_no_running_statistics() -> None:
    with pytest.raises(ValueError, match="expected a batch normalization with running statistics"):
        batch_norm.constant_statistics(nn.BatchNorm2d(4, track_running_stats=False), torch.float32)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_without_graph_breaks(momentum: float | None) -> None:
    torch._dynamo.reset()
    module = module_with_history(6, torch.float32, momentum=momentum)
    eager = copy.deepcopy(module)

    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for samples in (2, 3, 5):
        y, grad = (maps.channels_last(torch.randn(samples, 6, 4, 4)) for _ in range(2))
        here, there = y.clone().requires_grad_(), y.clone().requires_grad_()
        ours = output_and_gradients(compiled(module, here, maps.RELU), here, module, grad)
        expected = output_and_gradients(fused(eager, there, maps.RELU), there, eager, grad)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()))
