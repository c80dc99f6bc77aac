"""Blocks whose launches are replayed, on the simulated GPU with interpreted Triton kernels: steps on new data, after the first
one that is recorded, agree with plain layers in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from biasloss_ext.nn import (
    FusedConvNormActivation,
    FusedInvertedResidual,
    InvertedResidual,
    chain_replay,
    prepared_weights,
)
from biasloss_ext.ops import triton_replay
from biasloss_ext.ops.native import simulated
from biasloss_ext.ops.replay import Place

pytestmark = pytest.mark.skipif(
    not simulated(), reason="needs the simulated GPU: CPU kernels are not launched by Triton"
)
STEPS = 3


@dataclass
class Replays:
    served: int = 0
    refused: int = 0


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replays]:
    found, replay = Replays(), triton_replay.Recording.replay
    chain_replay._forwards.clear()
    chain_replay._backwards.clear()

    def counted(self: triton_replay.Recording, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        results = replay(self, inputs)
        found.served += results is not None
        found.refused += results is None
        return results

    monkeypatch.setattr(triton_replay.Recording, "replay", counted)
    return found


@dataclass(frozen=True)
class Case:
    outputs: int = 8
    stride: int = 1
    attention: bool = True
    frozen: bool = False
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32


CASES = {
    "attention and residual": Case(),
    "stride": Case(outputs=12, stride=2),
    "no attention": Case(attention=False),
    "constant statistics": Case(frozen=True),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16 parameters": Case(dtype=torch.bfloat16, parameters=torch.bfloat16),
}


def blocks(case: Case) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The fused block, the plain one, and the plain one in float64."""
    torch.manual_seed(0)
    fused = FusedInvertedResidual(8, 16, case.outputs, 3, stride=case.stride, squeeze_excite=case.attention, fused=True)
    plain = InvertedResidual(8, 16, case.outputs, 3, stride=case.stride, squeeze_excite=case.attention)
    plain.load_state_dict(fused.state_dict())
    exact = copy.deepcopy(plain).double()
    for module in (fused, plain):
        module.to(case.parameters if module is fused else case.dtype).train(not case.frozen)
    return fused, plain, exact.train(not case.frozen)


def step(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = module(x)
    out.backward(grad)
    assert x.grad is not None
    found = {"output": out.detach(), "input": x.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_those_of_plain_layers(name: str, replays: Replays) -> None:
    case = CASES[name]
    fused, plain, exact = blocks(case)
    generator = torch.Generator().manual_seed(1)
    for number in range(STEPS):
        x = torch.randn(3, 8, 5, 4, generator=generator).to(case.dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            grad = torch.randn(exact(x.double()).shape, generator=generator).to(case.dtype)
        for module in (fused, plain):  # the forward pass for the shape has moved the running statistics
            module.load_state_dict(exact.state_dict())
        found, own, truth = step(fused, x, grad), step(plain, x, grad), step(exact, x.double(), grad.double())
        for part, value in truth.items():
            size = value.abs().max().item()
            error = (found[part].double() - value).abs().max().item()
            allowed = 2 * (own[part].double() - value).abs().max().item() + 4 * torch.finfo(case.dtype).eps * size
            assert error <= allowed, f"{part} of step {number}: {error:.3g}, allowed {allowed:.3g}"
    assert (replays.served, replays.refused) == (2 * (STEPS - 1), 0)


def test_saved_maps_may_come_back_in_another_layout(replays: Replays) -> None:
    """As from hooks that keep saved tensors in the host's memory."""
    fused, _, exact = blocks(Case())
    generator = torch.Generator().manual_seed(1)
    for layout in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(3, 8, 5, 4, generator=generator).contiguous(memory_format=torch.channels_last)
        grad = torch.randn(3, 8, 5, 4, generator=generator)

        def packed(t: Tensor, layout: torch.memory_format = layout) -> Tensor:
            return t.detach().clone(memory_format=layout) if t.dim() == 4 and t.shape[2] > 1 else t.detach()

        with torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
            found = step(fused, x, grad)
        truth = step(exact, x.double(), grad.double())
        for part, value in truth.items():
            torch.testing.assert_close(found[part].to(value.dtype), value, rtol=1e-4, atol=1e-4)
    assert replays.served == 2


def test_addresses_are_those_of_the_tensors(replays: Replays) -> None:
    """Compiled kernels take addresses, the interpreter tensors; both come from the same places."""
    fused, _, _ = blocks(Case())
    inputs: list[tuple[triton_replay.Recording, tuple[Tensor | None, ...]]] = []
    replay = triton_replay.Recording.replay

    def noted(self: triton_replay.Recording, given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        inputs.append((self, given))
        return replay(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_replay.Recording, "replay", noted)
        for _ in range(2):
            x = torch.randn(3, 8, 5, 4).contiguous(memory_format=torch.channels_last)
            step(fused, x, torch.ones(3, 8, 5, 4))
    assert len(inputs) == 2
    compared = 0
    for recording, given in inputs:
        memory = recording.memory(given)
        assert memory is not None
        table, addresses = memory
        recording.enter_parts(table)
        for launched in recording.steps:
            if isinstance(launched, triton_replay.LaunchStep):
                for place, pointer in zip(launched.places, launched.pointers(addresses), strict=True):
                    if isinstance(place, Place) and table[place.entry] is not None:
                        tensor = triton_replay.tensor_at(place, table)
                        assert tensor is not None and pointer == tensor.data_ptr()
                        compared += 1
    assert compared > 50


class Network(nn.Module):
    """Prepares its weights as SkipblockNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            FusedInvertedResidual(8, 16, 8, 3, fused=True),
            FusedInvertedResidual(8, 24, 12, 3, stride=2, squeeze_excite=True, fused=True),
            FusedConvNormActivation(nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(), fused=True),
        )
        self.prepares = True

    def forward(self, x: Tensor) -> Tensor:
        prepared = self.prepares and prepared_weights.begin(self, x)
        assert prepared == self.prepares
        try:
            return self.blocks(x)  # type: ignore[no-any-return]
        finally:
            if prepared:
                prepared_weights.end()


def test_prepared_weights_change_no_bit() -> None:
    """In float16: the interpreter cuts bfloat16 off, where torch and a GPU round."""
    torch.manual_seed(0)
    network, results = Network(), []
    for prepares in (True, False):
        network.prepares = prepares
        for scale in (1.0, 2.0):  # a change that leaves no trace in the version of a tensor
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.data.mul_(scale)
            x = torch.randn(3, 8, 5, 4, generator=torch.Generator().manual_seed(1))
            with torch.autocast("cpu", torch.float16):
                results.append(step(network, x.contiguous(memory_format=torch.channels_last), torch.ones(3, 16, 3, 2)))
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.data.div_(scale)
                elif isinstance(layer, nn.BatchNorm2d):
                    layer.reset_running_stats()
    for ours, expected in ((results[0], results[2]), (results[1], results[3])):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not torch.equal(results[0]["output"], results[1]["output"])


def test_nothing_stays_prepared_after_an_exception() -> None:
    network = Network()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="channels"):
        network(torch.randn(3, 9, 5, 4))
    assert prepared_weights._prepared.copies is None
