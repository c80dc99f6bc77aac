"""The bookkeeping of fused batch normalisation against `nn.BatchNorm2d`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext.nn import batch_norm
from biasloss_ext.ops import maps
from biasloss_ext.ops.batch_norm import op

BACKENDS = ("cpu", "reference")
CPU = torch.device("cpu")
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


def fused(module: nn.BatchNorm2d, y: Tensor, activation: int, grad: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Output, and gradients of y, weight and bias, by the ops."""
    count = y.numel() // y.shape[1]
    dtype = maps.accumulation_dtype(y.dtype)
    frozen = not batch_norm.uses_batch_statistics(module)
    if frozen:
        moments = batch_norm.running_moments(module, dtype)
    else:
        moments = op.moments(y, device=CPU, backend=backend)
        batch_norm.update_running(module, moments, count)
    affine = batch_norm.affine(moments, module.weight, module.bias, module.eps, backend=backend)
    if frozen:
        assert torch.equal(affine, batch_norm.running_affine(module, dtype, backend=backend))
    out = op.apply(y, affine, activation, None, device=CPU, backend=backend)
    sums = op.sums(grad, y, affine, moments[0], activation, device=CPU, backend=backend)
    coefficients, parameter_grads = batch_norm.coefficients(
        sums, affine, moments, module.eps, count, frozen, backend=backend
    )
    dy = op.backward(grad, y, affine, coefficients, activation, device=CPU, backend=backend)
    return out, dy, parameter_grads[0], parameter_grads[1]


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
@torch.no_grad()
def test_forward_and_backward(
    backend: str, activation: int, channels: int, options: dict[str, object], training: bool
) -> None:
    module = module_with_history(channels, **options).train(training)
    plain = copy.deepcopy(module)
    y = map_of(channels)
    for _ in range(3):  # the running statistics of several steps
        y = maps.channels_last(y + 0.5)
        grad = maps.channels_last(torch.randn_like(y))
        ours = fused(module, y, activation, grad, backend)
        with torch.enable_grad():
            leaf = y.clone().requires_grad_()
            out = ACTIVATIONS[activation](plain(leaf))
            leaves = [leaf, *([] if plain.weight is None else [plain.weight, plain.bias])]
            expected = [out, *torch.autograd.grad(out, leaves, grad)]
        for mine, theirs in zip(ours, expected, strict=False):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.1, None])
@torch.no_grad()
def test_running_statistics_keep_their_dtype(dtype: torch.dtype, momentum: float | None) -> None:
    module = module_with_history(8, dtype, momentum=momentum)
    exact = copy.deepcopy(module).double()
    for step in range(3):
        y = map_of(8, torch.float64, mean=step)
        batch_norm.update_running(module, maps.moments_of(y.float()), y.numel() // 8)
        exact(y)
        for ours, truth in zip(module.buffers(), exact.buffers(), strict=True):
            assert ours.dtype in (dtype, torch.int64)
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(ours.double(), truth.double(), rtol=2 * rounding, atol=2 * rounding)
    affine = batch_norm.running_affine(module)
    assert affine.dtype == torch.float32
    mean, var = module.running_mean.double(), module.running_var.double()
    scale = module.weight.double() / torch.sqrt(var + module.eps)
    torch.testing.assert_close(affine.double(), torch.stack((scale, module.bias.double() - scale * mean)))


@torch.no_grad()
def test_what_changes_no_statistics() -> None:
    moments = torch.rand(2, 4, dtype=torch.float64)
    for change in ("evaluation", "tracking switched off"):
        module = module_with_history(4)
        if change == "evaluation":
            module.eval()
        else:
            module.track_running_stats = False
        before = copy.deepcopy(module.state_dict())
        batch_norm.update_running(module, moments, 10)
        torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)

    module = module_with_history(4)
    plain = copy.deepcopy(module)
    batch_norm.update_running(module, torch.zeros(2, 4, dtype=torch.float64), 0)
    plain(torch.zeros(0, 4, 2, 2, dtype=torch.float64))
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
        batch_norm.update_running(module, torch.zeros(2, 4), 1)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


def test_no_running_statistics() -> None:
    with pytest.raises(ValueError, match="expected a batch normalisation with running statistics"):
        batch_norm.running_affine(nn.BatchNorm2d(4, track_running_stats=False))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_without_graph_breaks(momentum: float | None) -> None:
    torch._dynamo.reset()
    module = module_with_history(6, torch.float32, momentum=momentum)
    eager = copy.deepcopy(module)

    def step(module: nn.BatchNorm2d, y: Tensor) -> tuple[Tensor, Tensor]:
        count = y.numel() // y.shape[1]
        moments = op.moments(y, device=CPU)
        batch_norm.update_running(module, moments, count)
        affine = batch_norm.affine(moments, module.weight, module.bias, module.eps)
        return batch_norm.coefficients(moments, affine, moments, module.eps, count, False)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for samples in (2, 3, 5):
            y = maps.channels_last(torch.randn(samples, 6, 4, 4))
            torch.testing.assert_close(compiled(module, y), step(eager, y))
            torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()))
