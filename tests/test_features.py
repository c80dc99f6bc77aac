"""FeatureTap: Bias Loss on a model that was written without it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call

from biasloss_ext import FeatureTap, FusedBiasLoss


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


def test_gives_features_and_output() -> None:
    net, images = network(), torch.randn(4, 3, 8, 8)
    tap = FeatureTap(net, "0")
    features, output = tap(images)
    assert features.shape == (4, 8, 6, 6)
    assert not features.requires_grad
    assert torch.equal(net[1:](features), output)
    FusedBiasLoss()(features, output, torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_state_dict_is_the_model_s_own() -> None:
    net = network()
    tap = FeatureTap(net, "0.2")
    assert list(tap.state_dict()) == list(net.state_dict())
    other = FeatureTap(network(), "0")
    other.load_state_dict(tap.state_dict(), strict=True)
    wrapped = nn.ModuleDict({"tapped": tap})
    again = nn.ModuleDict({"tapped": FeatureTap(network(), "0")})
    again.load_state_dict(wrapped.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({}, strict=True)


def test_copies_do_not_share_features() -> None:
    tap = FeatureTap(network(), "0")
    twin = copy.deepcopy(tap)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(tap(images)[0], twin(images)[0])
    twin.remove()
    assert len(tap(images)) == 2
    with pytest.raises(RuntimeError, match="the tap on '0' was removed: make a new one"):
        twin(images)


def test_bad_names_and_outputs() -> None:
    with pytest.raises(ValueError, match=r"no module 'flat'; similar ones: 0, 1, 2"):
        FeatureTap(network(), "flat")
    with pytest.raises(ValueError, match=r"no module '0\.3'; similar ones: 0\."):
        FeatureTap(network(), "0.3")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.LSTM(3, 4)
            self.unused = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pair(x)[0]

    with pytest.raises(TypeError, match="output of 'pair' must be a tensor, got tuple"):
        FeatureTap(Two(), "pair")(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="'unused' did not run in this call"):
        FeatureTap(Two(), "unused")(torch.randn(2, 3))


class Backbone(nn.Module):
    """Its children and its own tensors have the names that are hard for a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential()
        self.model.add_module("fc", nn.Linear(6, 6))
        self.model.add_module("model", nn.Linear(6, 6))
        self.fc = nn.Linear(6, 4)
        self.module = nn.BatchNorm1d(6)
        self.module_name = nn.Linear(4, 4)
        self.forward_features = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.randn(6))
        self.register_buffer("shift", torch.randn(4))
        self.register_buffer("scratch", torch.randn(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.module(self.model(x + self.token))
        return self.forward_features(self.module_name(self.fc(hidden))) + self.shift

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def assert_equal(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name], name


@pytest.mark.parametrize("tapped", ["module", "model.fc", "model.model"])
def test_a_checkpoint_round_trips_whatever_the_children_are_called(tapped: str) -> None:
    first, second, bare = Backbone(), Backbone(), Backbone()
    tap, other = FeatureTap(first, tapped), FeatureTap(second, tapped)
    assert_equal(tap.state_dict(), first.state_dict())
    assert [name for name, _ in tap.named_parameters()] == [name for name, _ in first.named_parameters()]
    file = io.BytesIO()
    torch.save(tap.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    bare.load_state_dict(state)
    assert second.calls == 3
    assert_equal(second.state_dict(), first.state_dict())
    x = torch.randn(5, 6)
    for model in (tap, other, bare):
        model.eval()
    features, output = tap(x)
    assert torch.equal(output, bare(x))
    assert torch.equal(other(x)[0], features)
    other.load_state_dict(Backbone().state_dict(), assign=True)
    assert not torch.equal(other(x)[1], output)


def test_functions_that_find_tensors_by_name() -> None:
    source, tap = Backbone().eval(), FeatureTap(Backbone().eval(), "module")
    x = torch.randn(3, 6)
    for module in (source, tap):
        own = {name: value for name, value in module.state_dict().items() if name != "_extra_state"}
        assert torch.equal(functional_call(tap, own, x)[1], source(x) if module is source else tap(x)[1])

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(tap, parameters, (x,))[1].square().sum()

    gradients = torch.func.grad(loss)(dict(tap.named_parameters()))
    own = tap(x)[1].square().sum()
    own.backward()
    torch.testing.assert_close(gradients["model.fc.weight"], tap.get_parameter("model.fc.weight").grad)
    stacked = torch.func.vmap(lambda one: tap(one[None])[0])(torch.randn(4, 6))
    assert stacked.shape == (4, 1, 6)


def test_distributed_checkpoints() -> None:
    first, second = network(), network()
    second[0][0].weight.data.zero_()
    tap, other = FeatureTap(first, "0"), FeatureTap(second, "0.1")
    state = get_model_state_dict(tap)
    assert_equal(state, get_model_state_dict(first))
    set_model_state_dict(other, state)
    assert_equal(second.state_dict(), first.state_dict())
    hard, again = Backbone(), Backbone()
    set_model_state_dict(FeatureTap(again, "module"), get_model_state_dict(FeatureTap(hard, "module")))
    assert_equal(again.state_dict(), hard.state_dict())


def test_moves_converts_and_switches_modes_with_its_model() -> None:
    net = Backbone()
    tap = FeatureTap(net, "module")
    assert tap.double() is tap
    assert net.token.dtype == net.shift.dtype == net.fc.weight.dtype == torch.float64
    tap.eval()
    assert not net.training
    assert not net.module.training
    tap.train()
    assert net.training
    tap.requires_grad_(False)
    assert not net.token.requires_grad
    moved = FeatureTap(Backbone().to("meta"), "module").to_empty(device="cpu")
    assert moved.token.device.type == "cpu"


class Slow(nn.Module):
    """Another thread's turn comes between the tapped module and the end of the call."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
            torch.randn(50, 50) @ torch.randn(50, 50)
        return x


def test_threads_have_their_own_features() -> None:
    tap = FeatureTap(nn.Sequential(nn.Linear(4, 4), Slow(), nn.Linear(4, 4)).eval(), "0")
    inputs = [torch.full((2, 4), float(number)) for number in range(8)]
    expected = [tap(x)[0] for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda x: tap(x)[0], inputs))
            assert all(map(torch.equal, found, expected))


def replicate(network: nn.Module, count: int) -> list[Any]:
    """What ``torch.nn.parallel.replicate`` does, on one device: its own asks for GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        module = torch.nn.parallel.replicate
        names = module.__globals__  # type: ignore[attr-defined]
        patch.setitem(names, "_get_device_index", lambda device, optional: device)
        patch.setitem(
            names,
            "_broadcast_coalesced_reshape",
            lambda tensors, devices, detach=False: [[t * (n + 1) for t in tensors] for n in range(len(devices))],
        )
        return module(network, list(range(count)))


def test_replicas_have_their_own_features_and_tensors() -> None:
    net = Backbone().eval()
    tap = FeatureTap(net, "module")
    replicas = replicate(tap, 3)
    plain = replicate(net, 3)
    x = torch.randn(2, 6)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            found = list(pool.map(lambda replica: replica(x), replicas))
            for (features, output), model in zip(found, plain, strict=True):
                assert torch.equal(output, model(x))
                assert torch.equal(features, model.module(model.model(x + model.token)))
    assert not torch.equal(found[0][0], found[1][0])
    assert len(net.module._forward_hooks) == 1


class InPlace(nn.Module):
    """Works in place in some modes, as dropout does."""

    def __init__(self, modes: tuple[bool, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).add_(1) if self.training in self.modes else x


@pytest.mark.parametrize(
    "later", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), InPlace((True, False)), InPlace((True,))]
)
def test_features_are_the_modules_own_output_where_a_later_layer_works_in_place(later: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), later, nn.Flatten(), nn.Linear(144, 5))
    tap, images = FeatureTap(net, "1"), torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for training in (True, False, True):
        tap.train(training)
        copied = copy.deepcopy(net)
        expected = copied[1](copied[0](images)).clone()
        for _ in range(2):
            features, output = tap(images)
            assert features.is_contiguous(memory_format=torch.channels_last)
            if training:
                torch.testing.assert_close(features, expected)
            output.sum().backward()
    tap.eval()
    expected = net[1](net[0](images)).clone()
    with torch.no_grad():
        assert torch.equal(tap(images)[0], expected)
    with torch.inference_mode():
        assert torch.equal(tap(images)[0], expected)


def test_compiled_features_are_the_modules_own_output() -> None:
    tap = FeatureTap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), "0")
    x = torch.randn(2, 4)
    expected = tap(x)
    torch.testing.assert_close(torch.compile(tap, backend="aot_eager", fullgraph=True)(x), expected)
    assert tap._capture.traced is None


def test_no_copy_is_made_where_nothing_works_in_place() -> None:
    tap = FeatureTap(nn.Sequential(nn.Identity(), nn.Linear(4, 4)), "0")
    x = torch.randn(2, 4)
    assert tap(x)[0].data_ptr() != x.data_ptr()  # until it is known
    assert tap(x)[0].data_ptr() == x.data_ptr()


def test_a_layer_that_begins_to_work_in_place_is_an_error() -> None:
    later = InPlace(())
    tap = FeatureTap(nn.Sequential(nn.Linear(4, 4), later), "0")
    x = torch.randn(2, 4)
    tap(x)
    later.modes = (True, False)
    with pytest.raises(RuntimeError, match=r"a later layer overwrote the output of '0' in place.*call again"):
        tap(x)
    assert torch.equal(tap(x)[0], tap.model[0](x))  # type: ignore[index]


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_hooks_are_freed() -> None:
    net, images = network(), torch.randn(2, 3, 8, 8)
    taps = [FeatureTap(net, "0") for _ in range(50)]
    assert hooks(net) == 50
    taps[0].remove()
    taps[0].remove()
    assert hooks(net) == 49
    del taps
    gc.collect()
    assert hooks(net) == 0
    with FeatureTap(net, "0.1") as tap:
        tap(images)
    assert hooks(net) == 0
    with pytest.raises(RuntimeError, match="was removed"):
        tap(images)
    with pytest.raises(KeyError), FeatureTap(net, "0"):
        raise KeyError
    assert hooks(net) == 0
    tap = FeatureTap(net, "0")
    copied = copy.deepcopy(tap)
    del tap
    gc.collect()
    assert hooks(net) == 0
    assert len(copied(images)) == 2
    net.tap = FeatureTap(net, "0")  # a circle
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_no_maps_outlive_a_call() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(weakref.ref(x.untyped_storage()))
            raise ValueError

    seen: list[weakref.ref[Any]] = []
    net = nn.Sequential(nn.Linear(4, 4), Fails())
    tap = FeatureTap(net, "0")
    for call in (tap, net):
        with pytest.raises(ValueError):  # noqa: PT011
            call(torch.randn(2, 4))
    gc.collect()
    assert [storage() for storage in seen] == [None, None]
    tap.pop(1)  # type: ignore[operator]
    tap(torch.randn(2, 4))
    net(torch.randn(2, 4))
    assert tap._capture._calls.stack == []


def test_gradient_checkpointing_and_pickling() -> None:
    tap = FeatureTap(network(), "0")
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    again = torch.utils.checkpoint.checkpoint(tap, images, use_reentrant=False)
    again[1].sum().backward()
    file = io.BytesIO()
    torch.save(tap, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert hooks(loaded) == 1
    assert torch.equal(loaded.eval()(images)[0], tap.eval()(images)[0])


def test_why_a_module_did_not_run() -> None:
    net = network()
    tap = FeatureTap(net, "0.1")
    net[0][1] = nn.BatchNorm2d(8)
    with pytest.raises(RuntimeError, match=r"'0\.1' was replaced after the tap was made: make the tap last"):
        tap(torch.randn(2, 3, 8, 8))
