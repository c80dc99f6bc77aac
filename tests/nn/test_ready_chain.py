"""A block that has taken steps, and so remembers how it is computed, notices whatever changes in its layers."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from biasloss_ext import accelerate
from biasloss_ext.nn import FusedInvertedResidual, InvertedResidual
from biasloss_ext.nn.ready_chain import MOST_CALLS, ReadyChain
from tests.nn import lookalikes
from tests.nn.test_exchanged_layers import ATTENTIONS, EXCHANGES


def another_eps(layers: nn.Sequential) -> None:
    layers[1].eps = 0.5


def another_momentum(layers: nn.Sequential) -> None:
    layers[4].momentum = 0.7


def no_momentum(layers: nn.Sequential) -> None:
    layers[4].momentum = None


def frozen_norm(layers: nn.Sequential) -> None:
    layers[4].eval()


def no_running_statistics(layers: nn.Sequential) -> None:
    layers[1].running_mean = layers[1].running_var = None


def other_running_statistics(layers: nn.Sequential) -> None:
    layers[1].running_mean = torch.full_like(layers[1].running_mean, 2.0)


def another_weight(layers: nn.Sequential) -> None:
    layers[3].weight = nn.Parameter(torch.ones_like(layers[3].weight))


def no_affine(layers: nn.Sequential) -> None:
    layers[1].weight = layers[1].bias = None


def a_bias(layers: nn.Sequential) -> None:
    layers[0].bias = nn.Parameter(torch.ones(layers[0].out_channels))


def another_stride(layers: nn.Sequential) -> None:
    layers[3].stride = (2, 2)


def reflected(layers: nn.Sequential) -> None:
    layers[3] = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", groups=16, bias=False)


def hooks_in_a_new_dictionary(layers: nn.Sequential) -> None:
    layers[2]._forward_hooks = OrderedDict()
    layers[2].register_forward_hook(lambda module, arguments, output: 2 * output)


def another_class(layers: nn.Sequential) -> None:
    layers[2].__class__ = nn.Softplus
    layers[2].__setstate__({**nn.Softplus().__dict__})


def in_float64(layers: nn.Sequential) -> None:
    layers.double()


CHANGES = (
    another_eps, another_momentum, no_momentum, frozen_norm, no_running_statistics, other_running_statistics, another_weight,
    no_affine, a_bias, another_stride, reflected, hooks_in_a_new_dictionary, another_class, in_float64,
)  # fmt: skip


def step(block: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, all gradients, and all running statistics."""
    block.zero_grad()
    x = x.to(next(block.parameters()).dtype, copy=True).requires_grad_()
    out = block(x)
    out.square().sum().backward()
    found = [out, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]
    return [t.detach().clone() for t in found if t is not None]


def assert_same_steps(fused: nn.Module, plain: nn.Module) -> None:
    for _ in range(2):
        x = torch.randn(2, 8, 6, 6)
        for ours, expected in zip(step(fused, x), step(plain, x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [*CHANGES, *EXCHANGES, *ATTENTIONS], ids=lambda change: change.__name__)
def test_a_change_after_steps_is_noticed(change: Callable[[nn.Sequential], None]) -> None:
    torch.manual_seed(0)
    options = {"squeeze_excite": change in ATTENTIONS}
    strides = change is another_stride  # a residual would not fit
    fused = FusedInvertedResidual(8, 16, 12 if strides else 8, 3, **options)
    plain = InvertedResidual(8, 16, 12 if strides else 8, 3, **options)
    plain.load_state_dict(fused.state_dict())
    assert_same_steps(fused, plain)
    for block in (fused, plain):
        torch.manual_seed(1)
        change(block.conv)
    assert_same_steps(fused, plain)
    for block in (fused, plain):
        block.eval()
    assert_same_steps(fused, plain)


@pytest.mark.parametrize("change", [another_eps, other_running_statistics, another_weight, in_float64])
def test_an_accelerated_block_notices_too(change: Callable[[list[nn.Module]], None]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(lookalikes.TimmInvertedResidual(8, 16, 8), lookalikes.TorchvisionV2(8, 16, 8))
    fused = copy.deepcopy(plain)
    assert len(accelerate(fused).swapped) == 2
    assert_same_steps(fused, plain)
    for model in (fused, plain):
        norm = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][1]
        depthwise = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
        change(model if change is in_float64 else [model, norm, model, depthwise])  # type: ignore[arg-type]
    assert_same_steps(fused, plain)


def test_nothing_is_found_anew_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    first = ReadyChain._first_call
    monkeypatch.setattr(ReadyChain, "_first_call", lambda self, *a: found.append(1) or first(self, *a))  # type: ignore[func-returns-value]
    block = FusedInvertedResidual(8, 16, 8, 3, squeeze_excite=True)
    x = torch.randn(2, 8, 6, 6)
    for _ in range(3):
        block(x)
    assert len(found) == 1
    block.eval()(x)
    block(x)
    assert len(found) == 2
    for size in range(1, 3 * MOST_CALLS):
        block(torch.randn(1, 8, size, size))
    assert len(block.__dict__["_ready"].calls) <= MOST_CALLS


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_runs_its_own_layers(copied: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    block, x = FusedInvertedResidual(8, 16, 8, 3), torch.randn(2, 8, 6, 6)
    block(x)
    other = copied(block)
    other.conv = copy.deepcopy(block.conv)
    with torch.no_grad():
        other.conv[3].weight.zero_()
    plain = InvertedResidual(8, 16, 8, 3)
    plain.load_state_dict(other.state_dict())
    torch.testing.assert_close(other(x), plain(x))
