"""`accelerate` and `optimize_for_inference` on blocks of torchvision, timm and this package."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from biasloss_ext import FeatureTap, accelerate, measured, optimize_for_inference
from biasloss_ext.models import skipblocknet_xs
from biasloss_ext.nn import FusedConvNormActivation, InvertedResidual
from biasloss_ext.nn.fused_norm_activation import FusedNormActivation, fuse_norm
from biasloss_ext.nn.fused_wrapper import FusedBlock
from biasloss_ext.report import KINDS
from tests.dispatched import dispatched
from tests.nn import lookalikes
from tests.nn.blocks import randomize, step


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = lookalikes.network().double()
    randomize(made, torch.Generator().manual_seed(0))
    return made.double()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_accelerated_is_the_same_network(training: bool) -> None:
    plain = model().train(training)
    fused = copy.deepcopy(plain)
    report = accelerate(fused)
    assert [entry.name for entry in report.swapped] == [str(i) for i in range(10)]
    assert not report.left
    assert sum(isinstance(module, FusedBlock) for module in fused) == 9
    assert all(layer.reason is None for layer in report.layers if layer.kind == "depthwise convolution"), report
    assert list(fused.state_dict()) == list(plain.state_dict())
    grad = torch.randn(3, 10, dtype=torch.float64)
    results = []
    for network in (plain, fused):
        torch.manual_seed(2)  # the same samples are dropped
        results.append(step(network, network, images(), grad))
    for name, value in results[0].items():
        # torch takes the sixth of the hard sigmoid's slope in float32, whatever the dtype.
        atol = 1e-7 * max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_are_slower_fused_run_their_plain_layers(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Every second one, by a clock of this test; the calls that it is given run."""
    turns = itertools.count()

    def clock(calls: dict[str, Callable[[int], object]], *_: object) -> dict[str, list[float]]:
        for call in calls.values():
            call(0)
        plain = (0.5, 2.0)[next(turns) % 2]
        return {"fused": [1.0, 1.0, 9.0], "plain": [plain] * 3}

    monkeypatch.setattr(measured, "in_turns", clock)
    plain = model().train(training)
    network = copy.deepcopy(plain)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = accelerate(network, measure_on=images())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved while modules were timed"
    reason = r"the plain layers are faster: 0.5 ms, fused 1 ms, forward( and backward)? on \(3, .*\)"
    assert [entry.name for entry in report.left] == ["0", "2", "4", "6", "8"]
    assert all(re.fullmatch(reason, entry.reason or "") for entry in report.left)
    left, totals = (dispatched(copy.deepcopy(each), images()) for each in (network, plain))
    for kind in KINDS:
        assert (report.count(kind).total, left[kind]) == (totals[kind], totals[kind] - report.count(kind).fused), kind
    grad = torch.randn(3, 10, dtype=torch.float64)
    results = []
    for each in (plain, network):
        torch.manual_seed(2)
        results.append(step(each, each, images(), grad))
    for name, value in results[0].items():
        atol = 1e-7 * max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert not accelerate(network).left, "a later call measures nothing"


@pytest.mark.parametrize("training", [True, False])
def test_unsafe_plain_layers_are_not_timed(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """oneDNN's weight gradient of a strided 1x1 convolution of 3 channels writes past its memory."""
    timed = []

    def clock(calls: dict[str, Callable[[int], object]], *_: object) -> dict[str, list[float]]:
        timed.append(calls)
        return {"fused": [2.0], "plain": [1.0]}

    monkeypatch.setattr(measured, "in_turns", clock)
    layers = [nn.Sequential(nn.Conv2d(c, 16, 1, stride=2), nn.BatchNorm2d(16), nn.ReLU()) for c in (3, 16)]
    network = nn.Sequential(*layers).train(training)
    report = accelerate(network, measure_on=torch.randn(2, 3, 16, 16))
    assert [entry.name for entry in report.swapped] == (["0"] if training else [])
    assert len(timed) == (1 if training else 2)


def test_measuring_leaves_no_choice_to_fused() -> None:
    with pytest.raises(ValueError, match="measure_on chooses between fused and plain layers"):
        accelerate(model(), fused=True, measure_on=images())


def test_optimizers_checkpoints_and_modes_stay_valid() -> None:
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    accelerate(network)
    network(images()).sum().backward()
    optimizer.step()
    changed = network.state_dict()
    assert any(not torch.equal(changed[name], value) for name, value in before.items())
    model().load_state_dict(changed, strict=True)
    network.load_state_dict(before, strict=True)
    network.eval()
    assert not any(module.training for module in network.modules())
    twin = copy.deepcopy(network)
    torch.testing.assert_close(twin(images()), network(images()), rtol=0, atol=0)
    saved = io.BytesIO()
    torch.save(twin.state_dict(), saved)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert network(images()).abs().max() > 0, "a copy shares its parameters with the original"


def test_report_says_what_was_left_and_why() -> None:
    network = model()
    network[2].block[1][0] = nn.Conv2d(40, 40, 9, 2, 4, groups=40, bias=False).double()
    network[7].bn2.act = nn.ReLU()
    network[5].block[0][2] = nn.Tanh()
    network[5].forward = network[5].forward
    report = accelerate(network)
    text = str(report)
    assert "on fused kernels: 6 of 7 depthwise convolutions, 20 of 20 1x1 convolutions, 21 of 21 normalizations" in text
    assert "left: 1 depthwise convolution (2.block.1.0): the kernel is 9 x 9, there are 3 x 3, 5 x 5, 7 x 7" in text
    assert report.count("depthwise convolution") == (6, 7)
    assert [entry.name for entry in report.left] == ["5"]
    costs = [sum(layer.cost for layer in layers) for layers in report.reasons().values()]
    assert costs == sorted(costs, reverse=True)
    assert network(images()).shape == (3, 10)


@pytest.mark.parametrize("training", [True, False])
def test_the_report_counts_what_runs(training: bool) -> None:
    """Layers that are left are what PyTorch's kernels compute, and no others."""
    network = model()
    network[2].block[1][0] = nn.Conv2d(40, 40, 9, 2, 4, groups=40, bias=False).double()
    network[5].forward = network[5].forward
    network.train(training)
    totals = dispatched(network, images())
    report = accelerate(network)
    left = dispatched(network, images())
    for kind in KINDS:
        count = report.count(kind)
        assert totals[kind] == count.total, kind
        assert left[kind] == count.total - count.fused, kind
    assert sum(left.values()) > 0


def test_fused_true_names_the_block_and_swaps_nothing() -> None:
    network = model()
    network[2].block[1][0] = nn.Conv2d(40, 40, 9, 2, 4, groups=40, bias=False).double()
    with pytest.raises(ValueError, match=r"2\.block\.1\.0 \(Conv2d\) has no fused kernels: the kernel is 9 x 9"):
        accelerate(network, fused=True)
    assert not any(isinstance(module, (FusedBlock, FusedConvNormActivation)) for module in network.modules())


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        accelerate("mobilenet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model is itself a block"):
        accelerate(InvertedResidual(8, 16, 8, 3))
    with pytest.raises(ValueError, match="fused must be 'auto' or True, got False"):
        accelerate(model(), fused=False)
    with pytest.raises(TypeError, match="got str"):
        optimize_for_inference("mobilenet")  # type: ignore[arg-type]


def test_fused_norms_stay_what_they_are() -> None:
    """Of their class, for those who look for it; copied and pickled; plain where no fused kernels can serve them."""
    network = model()
    plain = copy.deepcopy(network[9])
    network[9].register_forward_hook(lambda module, inputs, output: output + 1)
    accelerate(network)
    x = torch.randn(4, 32, 5, 5, dtype=torch.float64)
    for norm in (network[9], copy.deepcopy(network[9])):
        assert isinstance(norm, FusedNormActivation)
        assert isinstance(norm, lookalikes.BatchNormAct2d)
        torch.testing.assert_close(norm(x), copy.deepcopy(plain)(x) + 1, rtol=1e-9, atol=1e-9)
    bare = fuse_norm(plain, True)
    again = pickle.loads(pickle.dumps(bare))
    torch.testing.assert_close(again(x), bare(x), rtol=0, atol=0)
    assert again.fused is True
    torch.testing.assert_close(again.running_mean, bare.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(torch.compile(bare, fullgraph=True, backend="eager")(x), bare(x), rtol=0, atol=0)
    bare.act = nn.Tanh()  # type: ignore[assignment]
    torch.testing.assert_close(bare.eval()(x), nn.BatchNorm2d.forward(bare, x).tanh(), rtol=0, atol=0)  # type: ignore[arg-type]
    dropping = model()
    dropping[9].drop = nn.Dropout(0.5)
    assert "left: 1 normalization (9): a normalization drops channels" in str(accelerate(dropping))


def test_hooks_stay() -> None:
    network = model()
    tapped = FeatureTap(network, "6")
    accelerate(network)
    features, scores = tapped(images())
    assert features.shape == (3, 24, 4, 3)
    assert scores.shape == (3, 10)


def test_own_models_are_switched_on() -> None:
    network = skipblocknet_xs(num_classes=10, fused=False)
    report = accelerate(network)
    assert network.base_block.fused == "auto"
    assert len(report.swapped) == 19  # 15 inverted residuals, two skip blocks, stem and last convolution
    assert not report.left


def test_optimized_gives_the_same_scores() -> None:
    network = model().eval()
    optimized = optimize_for_inference(network)
    with torch.no_grad():
        torch.testing.assert_close(optimized(images()), network(images()), rtol=1e-9, atol=1e-9)
    accelerated = model().eval()
    accelerate(accelerated)
    with torch.no_grad():
        torch.testing.assert_close(
            optimize_for_inference(accelerated)(images()), network(images()), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("return_features", ["none", "variance", "features"])
def test_optimized_skipblocknet(return_features: str) -> None:
    network = skipblocknet_xs(num_classes=10, return_features=return_features).double().eval()
    randomize(network, torch.Generator().manual_seed(3))
    network = network.double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(optimize_for_inference(network)(x), network(x), rtol=1e-8, atol=1e-8)


def test_optimized_follows_conversions() -> None:
    network = model().eval()
    optimized = optimize_for_inference(network).float()
    x = images().float()
    with torch.no_grad():
        expected = network(images())
        torch.testing.assert_close(optimized(x), expected.float(), rtol=1e-4, atol=1e-4)
        half = optimize_for_inference(network).to(torch.bfloat16)
        torch.testing.assert_close(half(x.bfloat16()).double(), expected, rtol=0.1, atol=0.1)
    assert next(network.parameters()).dtype == torch.float64, "the model itself was changed"
    with pytest.raises(RuntimeError, match="cannot be trained; train the model it was made from"):
        optimized.train()


def test_normalization_without_statistics_cannot_be_folded() -> None:
    network = model()
    network[1].block[0][1] = nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(ValueError, match="got one with track_running_stats=False"):
        optimize_for_inference(network)
