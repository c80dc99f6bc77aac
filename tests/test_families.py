"""Networks of timm and torchvision, one per family: what the report says is what runs, and results are the plain model's.

Both packages must be installed: ``make test-integrations``.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biasloss_ext import accelerate, optimize_for_inference
from biasloss_ext.report import DEPTHWISE, KINDS
from tests.dispatched import dispatched

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

# Whether all depthwise convolutions run on fused kernels.
MODELS = {
    "timm:mobilenetv4_conv_small_050": True,
    "timm:mobilenetv4_conv_medium": True,
    "timm:mobilenetv4_conv_aa_medium": True,
    "timm:mobilenetv4_hybrid_medium": True,
    "timm:mobilenetv3_small_050": True,
    "timm:mobilenetv2_050": True,
    "timm:mobilenetv1_100": True,
    "timm:lcnet_050": True,
    "timm:mnasnet_small": True,
    "timm:semnasnet_075": True,
    "timm:fbnetc_100": True,
    "timm:spnasnet_100": True,
    "timm:hardcorenas_a": True,
    "timm:tinynet_e": True,
    "timm:efficientnet_b0": True,
    "timm:efficientnetv2_rw_t": True,
    "timm:efficientnet_lite0": True,
    "timm:tf_efficientnet_lite0": True,
    "timm:tf_mobilenetv3_small_minimal_100": True,
    "timm:rexnet_100": True,
    "timm:ghostnet_050": True,
    "timm:repghostnet_050": True,
    "timm:repvit_m0_9": True,
    "timm:mobileone_s0": True,
    "timm:fastvit_t8": True,
    "timm:mobilevit_xxs": True,
    "timm:mobilevitv2_050": True,
    "timm:efficientvit_b0": True,
    "timm:efficientvit_m0": True,
    "timm:tiny_vit_5m_224": True,
    "timm:coatnet_pico_rw_224": True,
    "timm:convnext_atto": True,
    "timm:edgenext_xx_small": False,
    "timm:starnet_s050": True,
    "timm:hgnetv2_b0": True,
    "timm:mixnet_s": False,
    "torchvision:mobilenet_v2": True,
    "torchvision:mobilenet_v3_small": True,
    "torchvision:mnasnet0_5": True,
    "torchvision:shufflenet_v2_x0_5": True,
}


def made(name: str) -> nn.Module:
    """Nothing is dropped, and parameters of normalizations are as after some training."""
    torch.manual_seed(0)
    source, _, rest = name.partition(":")
    model: nn.Module
    if source == "timm":
        model = timm.create_model(rest, num_classes=10)
    else:
        model = torchvision.models.get_model(rest, weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        for attribute in ("drop_prob", "p", "drop_rate", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def images(model: nn.Module, samples: int = 2, seed: int = 1) -> Tensor:
    """Odd sizes where the model takes any."""
    config: Any = getattr(model, "default_cfg", None) or {}
    size = config.get("input_size", (3, 96, 96))[-1] if config.get("fixed_input_size") else 96
    shape = (samples, 3, size, size if size != 96 else 81)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_statistics(model: nn.Module) -> nn.Module:
    """The model with running statistics near those of its maps: with any others, rounding grows from layer to layer."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images(model, seed=0).to(next(model.parameters()).dtype))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and running statistics of a training step, and scores in evaluation."""
    out = model.train()(x)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)
    statistics = [buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()]
    with torch.no_grad():
        return [out.detach(), *(g for g in gradients if g is not None), *statistics, model.eval()(x)]


@pytest.mark.parametrize("name", MODELS)
def test_the_report_counts_what_runs(name: str) -> None:
    model = made(name).train()
    x = images(model)
    totals = dispatched(model, x)
    report = accelerate(model)
    left = dispatched(model, x)
    for kind in KINDS:
        count = report.count(kind)
        assert totals[kind] == count.total, kind
        assert left[kind] == count.total - count.fused, kind
    depthwise = report.count(DEPTHWISE)
    assert (depthwise.fused == depthwise.total) == MODELS[name], report


@pytest.mark.parametrize("name", MODELS)
def test_results_are_the_plain_models(name: str) -> None:
    """In float64: what is left of a difference is rounding, and not one of single precision."""
    plain = with_statistics(made(name).double())
    x = images(plain).double()
    ours, optimized = copy.deepcopy(plain), optimize_for_inference(plain)
    accelerate(ours)
    with torch.no_grad():
        for batch in (x, x[:1]):
            scores = copy.deepcopy(plain).eval()(batch)
            for model in (ours.eval(), optimized):
                torch.testing.assert_close(model(batch), scores, rtol=1e-8, atol=1e-8 * scores.abs().max().item())
    truths, found = results(plain, x), results(ours, x)
    largest = max(truth.abs().max().item() for truth in truths[1:-1])
    for truth, value in zip(truths, found, strict=True):
        # torch takes the sixth of the hard sigmoid's slope in float32, whatever the dtype.
        scale = max(truth.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-6 * scale if math.isfinite(scale) else 0)


def errors(truths: list[Tensor], found: list[Tensor]) -> list[float]:
    """Relative, of output, gradients, running statistics and scores: the mean of those of the tensors."""
    largest = max(truth.abs().max().item() for truth in truths)
    relative = [
        (value - truth).norm().item() / max(truth.norm().item(), 1e-6 * largest)
        for truth, value in zip(truths, found, strict=True)
    ]
    return [relative[0], math.fsum(relative[1:-1]) / len(relative[1:-1]), relative[-1]]


def single_precision(
    model: nn.Module, ours: Callable[[nn.Module], nn.Module], layout: torch.memory_format
) -> list[float]:
    """Errors of a form of a model in float32, medians over draws of the images: in a few draws one value falls on the other side
    of a kink and changes many gradients, in any form."""
    drawn = []
    for seed in range(1, 4):
        x = images(model, seed=seed)
        truths = results(copy.deepcopy(model).double(), x.double())
        found = results(ours(copy.deepcopy(model)), x.contiguous(memory_format=layout))
        drawn.append(errors(truths, [t.double() for t in found]))
    return [statistics.median(part) for part in zip(*drawn, strict=True)]


def accelerated(model: nn.Module) -> nn.Module:
    accelerate(model)
    return model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def bound(own: float) -> float:
    """Twice eager's error; a network that amplifies rounding that much leaves the rest to chance."""
    return (2 if own < 1e-2 else 10) * own + 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_float32_errors(name: str) -> None:
    """Within twice eager's, in the layout in which eager has the larger ones: kernels for channels_last sum in another order."""
    model = with_statistics(made(name))
    ours = single_precision(model, accelerated, torch.contiguous_format)
    eager = single_precision(model, copy.deepcopy, torch.contiguous_format)
    if any(a > bound(b) for a, b in zip(ours, eager, strict=True)):
        last = single_precision(model, channels_last, torch.channels_last)
        eager = [max(pair) for pair in zip(eager, last, strict=True)]
    for part, a, b in zip(("output", "gradients and statistics", "scores"), ours, eager, strict=True):
        assert a <= bound(b), f"{part}: {a:.2e}, eager {b:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_float32_errors_of_optimized_models(name: str) -> None:
    model = with_statistics(made(name)).eval()
    x = images(model)[:1]
    with torch.no_grad():
        truth, eager = copy.deepcopy(model).double()(x.double()), model(x)
        found = optimize_for_inference(model)(x)
    own = (eager - truth).norm() / truth.norm()
    assert (found - truth).norm() / truth.norm() <= bound(own.item()), (found, eager, truth)


COMPILED = (
    "timm:mobilenetv4_conv_small_050",
    "timm:mobilenetv3_small_050",
    "timm:lcnet_050",
    "timm:mnasnet_small",
    "timm:efficientnet_lite0",
    "timm:ghostnet_050",
    "timm:repvit_m0_9",
    "timm:rexnet_100",
    "torchvision:mobilenet_v2",
    "torchvision:shufflenet_v2_x0_5",
)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps(name: str, backend: str) -> None:
    """Two steps of a compiled accelerated model, against the plain model's in float64 and its errors in both layouts."""
    torch._dynamo.reset()
    plain = with_statistics(made(name))
    ours = copy.deepcopy(plain)
    accelerate(ours)
    compiled = torch.compile(ours, backend=backend)
    exact, last = copy.deepcopy(plain).double(), channels_last(copy.deepcopy(plain))

    def step(model: nn.Module, parameters: Any, x: Tensor) -> Tensor:
        out: Tensor = model(x)
        parameters = list(parameters)
        gradients = torch.autograd.grad(out.square().mean(), parameters)
        length = torch.stack([grad.norm() for grad in gradients]).norm().item()  # in the hundreds for random weights
        for parameter, grad in zip(parameters, gradients, strict=True):
            parameter.data.sub_(grad, alpha=0.01 / max(length, 1))
        return out.detach().double()

    for seed in (1, 2):
        x = images(plain, samples=4, seed=seed)
        truth = step(exact.train(), exact.parameters(), x.double())
        eager = step(plain.train(), plain.parameters(), x)
        eager_last = step(last.train(), last.parameters(), x.contiguous(memory_format=torch.channels_last))
        found = step(compiled.train(), ours.parameters(), x)
        own = max((eager - truth).norm(), (eager_last - truth).norm())
        assert (found - truth).norm() <= 4 * own + 1e-5 * truth.norm(), (seed, found, truth)


@pytest.mark.parametrize("location", ["bottleneck", "expansion"])
def test_feature_maps_of_timm(location: str) -> None:
    """Those within a block are taken by hooks, for which it runs its plain layers."""
    options = {"features_only": True, "feature_location": location}
    model = timm.create_model("efficientnet_b0", **options).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        accelerate(model)
        found = model(x)
    assert len(found) == len(expected) == 5
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_feature_maps_of_torchvision() -> None:
    model = torchvision.models.mobilenet_v3_small().eval()
    accelerate(model)
    extract = torchvision.models.feature_extraction.create_feature_extractor(
        model, {"features.3": "a", "features.12": "b"}
    )
    assert {name: tuple(found.shape) for name, found in extract(torch.randn(1, 3, 64, 64)).items()} == {
        "a": (1, 24, 8, 8),
        "b": (1, 576, 2, 2),
    }


def test_quantizable_models_are_fused_before() -> None:
    model = torchvision.models.quantization.mobilenet_v2(quantize=False).eval()
    accelerate(model)
    with pytest.raises(RuntimeError, match=r"call it before accelerate\(\)"):
        model.fuse_model()


DENSE = {
    "segmentation": ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"),
    "detection": ("ssdlite320_mobilenet_v3_large",),
}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in DENSE.items() for name in names])
def test_dilated_backbones_and_heads(task: str, name: str) -> None:
    torch.manual_seed(0)
    builder = getattr(getattr(torchvision.models, task), name)
    model = builder(weights=None, weights_backbone=None).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = model(x)
        report = accelerate(model)
        found = model(x)
    assert report.count(DEPTHWISE).fused == report.count(DEPTHWISE).total, report
    if task == "segmentation":
        torch.testing.assert_close(found["out"], expected["out"], rtol=1e-3, atol=1e-4)
