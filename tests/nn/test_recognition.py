"""Blocks are known by what they compute: hand-written ones are found, and what only looks like a block is left alone."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext import accelerate, optimize_for_inference
from biasloss_ext.nn.chain_parts import DEPTHWISE, POINTWISE
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.nn.plan import Plan, plan_of
from biasloss_ext.ops import maps
from tests.nn.blocks import randomize


class Bottleneck(nn.Module):
    """A block of MobileNetV2 as somebody might write it."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.widen, self.norm_a = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.spread = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm_b, self.activation = nn.BatchNorm2d(hidden), nn.ReLU6()
        self.narrow, self.norm_c = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm_a(self.widen(x)))
        h = F.relu6(self.norm_b(self.spread(h)))
        h = self.norm_c(self.narrow(h))
        return x + h if self.same else h


class Gated(nn.Module):
    """With squeeze-and-excitation, functions instead of layers, and the sum the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False), nn.BatchNorm2d(16))
        self.pool, self.less, self.more = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.last = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.second(self.first(x)))
        gate = torch.sigmoid(self.more(F.relu(self.less(self.pool(h)))))
        h = self.last(gate.expand_as(h) * h)
        h += x
        return h


class Gelus(Bottleneck):
    """One form of GELU as a layer, the other as a function."""

    def __init__(self, of_layer: str, of_function: str) -> None:
        super().__init__(8, 16, 8)
        self.activation, self.of_function = nn.GELU(of_layer), of_function  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm_a(self.widen(x)))
        h = F.gelu(self.norm_b(self.spread(h)), approximate=self.of_function)
        return x + self.norm_c(self.narrow(h))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class HSwish(nn.Module):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(F.relu6(x + 3) / 6) if self.inplace else x * F.relu6(x + 3) / 6


def with_activation(activation: nn.Module) -> nn.Module:
    block = Bottleneck(8, 16, 8)
    block.activation = activation  # type: ignore[assignment]
    return block


class Twice(Bottleneck):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Peeking(Bottleneck):
    """It uses a map within the block twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm_a(self.widen(x)))
        y = self.norm_c(self.narrow(F.relu6(self.norm_b(self.spread(h)))))
        return x + y + h.mean()


class Deciding(Bottleneck):
    """Its data flow depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else x


class Hardsigmoid(nn.Module):
    """A wrong name."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's by its name, but it activates before it normalizes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))


class Conv2dNormActivation(nn.Sequential):
    """As torchvision's by its name, with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class DroppingWithoutSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.drop = Bottleneck(8, 16, 12), nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.block(x))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: Bottleneck(8, 16, 8),
    "stride": lambda: Bottleneck(8, 16, 12, 2),
    "gated": Gated,
    "gelu": lambda: Gelus("none", "tanh"),
    "own swish": lambda: with_activation(Swish()),
    "own hard swish": lambda: with_activation(HSwish()),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a subclass": lambda: Twice(8, 16, 8),
    "a second use": lambda: Peeking(8, 16, 8),
    "control flow": lambda: Deciding(8, 16, 8),
    "a wrong name": lambda: with_activation(Hardsigmoid()),
    "a slope": lambda: with_activation(nn.LeakyReLU(0.0)),
    "a norm of the same name": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), BatchNormAct2d(8)),
    "a layer of the same name": lambda: Conv2dNormActivation(
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    ),
    "dropout without a sum": DroppingWithoutSum,
}


# What of them is fused all the same: kinds of steps.
FUSED_OF_OTHERS = {
    "a subclass": [[POINTWISE, DEPTHWISE, POINTWISE]],
    "a second use": [[POINTWISE], [DEPTHWISE, POINTWISE]],
    "a wrong name": [[POINTWISE], [DEPTHWISE, POINTWISE]],
    "a slope": [[POINTWISE], [DEPTHWISE, POINTWISE]],
    "a layer of the same name": [[POINTWISE]],
    "dropout without a sum": [[POINTWISE, DEPTHWISE, POINTWISE]],
}


def network(make: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(make(), nn.Identity()).double()
    randomize(made, torch.Generator().manual_seed(0))
    return made.double()


def results(model: nn.Module) -> list[Tensor]:
    """Of a training step, and of evaluation after it."""
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)
    out = model.train()(x)
    gradients = torch.autograd.grad(out.square().sum(), (x, *model.parameters()))
    statistics = [buffer.double() for buffer in model.buffers()]
    with torch.no_grad():
        return [out.detach(), *gradients, *statistics, model.eval()(x)]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for ours, expected in zip(results(model), results(other), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * max(expected.abs().max().item(), 1.0))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_hand_written_block_is_found(name: str) -> None:
    plain = network(BLOCKS[name])
    fused = copy.deepcopy(plain)
    report = accelerate(fused)
    assert isinstance(fused[0], FusedBlock), report
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same(fused, plain)
    with torch.no_grad():
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(optimize_for_inference(plain)(x), plain.eval()(x), rtol=1e-8, atol=1e-8)


def chains_of(model: nn.Module) -> list[list[int]]:
    """The kinds of the steps of all chains."""
    plan = model[0].plan() if isinstance(model[0], FusedBlock) else None  # type: ignore[index]
    return [[step.kind for step in planned.chain.steps] for planned in plan.chains] if isinstance(plan, Plan) else []


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_a_block_computes_what_it_did(name: str) -> None:
    plain = network(OTHERS[name])
    fused = copy.deepcopy(plain)
    accelerate(fused)
    assert chains_of(fused) == FUSED_OF_OTHERS.get(name, [])
    assert_same(fused, plain)
    with torch.no_grad():
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(optimize_for_inference(plain)(x), plain.eval()(x), rtol=1e-8, atol=1e-8)


def test_a_forward_method_of_an_instance_is_left() -> None:
    model = network(BLOCKS["bottleneck"])
    model[0].forward = lambda x: 2 * Bottleneck.forward(model[0], x)  # type: ignore[method-assign, assignment]
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    expected = model.eval()(x)
    report = accelerate(model)
    assert "(0.widen, 0.norm_a, 0.norm_b, 0.narrow ...): it has a forward method of its own" in str(report)
    assert report.count("depthwise convolution") == (1, 1), "the convolution itself has a kernel"
    torch.testing.assert_close(model(x), expected)


def test_a_layer_exchanged_later_is_computed() -> None:
    plain = network(BLOCKS["bottleneck"])
    fused = copy.deepcopy(plain)
    accelerate(fused)
    for model in (plain, fused):
        model[0].activation = nn.Softplus()
    assert_same(fused, plain)
    for model in (plain, fused):
        model[0].activation = nn.Hardswish()
    assert_same(fused, plain)


def test_attributes_and_methods_are_those_of_the_block() -> None:
    class Counted(Bottleneck):
        label = "bottleneck"

        def width(self) -> int:
            return self.spread.in_channels

    model = network(lambda: Counted(8, 16, 8))
    accelerate(model)
    block: Any = model[0]
    assert (block.same, block.label, block.width()) == (True, "bottleneck", 16)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = block.nothing_of_the_kind
    block.same = False
    plain = network(lambda: Counted(8, 16, 8))
    plain[0].same = False  # type: ignore[assignment]
    assert_same(model, plain)


def test_hooks_of_all_kinds_stay() -> None:
    model, seen = network(BLOCKS["bottleneck"]), []
    block = model[0]
    block.register_forward_pre_hook(lambda *_: seen.append("pre"))
    block.register_forward_pre_hook(lambda *_: seen.append("pre with options"), with_kwargs=True)
    block.register_forward_hook(lambda *_: seen.append("forward"))
    block.register_forward_hook(lambda *_: seen.append("with options"), with_kwargs=True)
    block.register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    block.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    block.register_state_dict_post_hook(lambda *_: seen.append("state"))
    block.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    accelerate(model)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert sorted(seen) == sorted(
        ["pre", "pre with options", "forward", "with options", "always", "backward pre", "backward", "state", "load"]
    )


def separable() -> nn.Module:
    """As MobileNetV1 is written: one long sequence is no block, but its sequences are layers."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(16, 16, 5, 2, 2, groups=16), nn.BatchNorm2d(16), nn.SiLU()),
        nn.Sequential(nn.Conv2d(16, 8, 3, 1, 1, groups=2), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=8), nn.BatchNorm2d(8), nn.Hardswish()),
    )


def test_sequences_are_fused_under_their_own_names() -> None:
    plain = network(separable)
    plain[0][1] = nn.Sequential(OrderedDict(conv=plain[0][1][0], norm=plain[0][1][1], activation=plain[0][1][2]))
    fused = copy.deepcopy(plain)
    assert len(accelerate(fused).swapped) == 5
    assert list(fused.state_dict()) == list(plain.state_dict())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert_same(fused, plain)
    called = {event.key for event in profile.key_averages()}
    assert {"biasloss_ext::depthwise", "biasloss_ext::depthwise_backward", "biasloss_ext::pointwise"} <= called


def test_copies_and_pickles() -> None:
    model = network(BLOCKS["gated"])
    accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin[0], FusedBlock)
        assert twin[0].plain.less is twin[0].less
        assert_same(copy.deepcopy(twin), copy.deepcopy(model))


@pytest.mark.parametrize("forms", [("none", "tanh"), ("tanh", "none")])
def test_forms_of_gelu(forms: tuple[str, str]) -> None:
    plan = plan_of(Gelus(*forms))
    assert isinstance(plan, Plan)
    numbers = {"none": maps.GELU, "tanh": maps.GELU_TANH}
    assert [step.activation for step in plan.chains[0].chain.steps] == [
        *(numbers[form] for form in forms),
        maps.IDENTITY,
    ]
