"""What a user does with the package on one backend, in a process of its own.

``python -m tests.front_door_user BACKEND DRAWS NETWORK...``; without a network, everything else.

Prints one line of JSON for each thing done: how far it is from float64, how far PyTorch's own float32 is, and what is allowed.
Nothing is registered, built or imported before, so that what the package fails to do by itself shows.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasloss_ext
from biasloss_ext import FeatureTap, FusedBiasLoss, accelerate, functional, optimize_for_inference
from biasloss_ext.models import skipblocknet_xs
from biasloss_ext.nn import DepthwiseConv2d
from biasloss_ext.ops.backends import why_not
from biasloss_ext.ops.registry import OPS

CPU = torch.device("cpu")
# Beside twice PyTorch's own error, relative to the largest element: where that happens to be exact.
ALLOWED = 1e-6
Tensors = Sequence[Tensor]


def distance(found: Tensors, truth: Tensors) -> float:
    """The largest error relative to the largest element of each tensor that has any."""
    assert [t.shape for t in found] == [t.shape for t in truth]
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, truth, strict=True) if b.numel() > 0]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def norm_of_difference(found: Tensors, truth: Tensors) -> float:
    """Over all tensors at once, relative: what a few roundings that cross a kink change does not decide it."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, truth, strict=True)]
    size = sum(b.square().sum().item() for _, b in pairs)
    return (sum((a - b).square().sum().item() for a, b in pairs) / size) ** 0.5


def report(what: str, ours: float, eager: float) -> None:
    print(json.dumps({"what": what, "error": ours, "eager": eager, "allowed": 2 * eager + ALLOWED}), flush=True)


def compare(what: str, ours: Tensors, eager: Tensors, exact: Tensors) -> None:
    report(what, distance(ours, exact), distance(eager, exact))


def ops(backend: str) -> None:
    """Every op that has the backend, on its samples."""
    from tests.calls import in_a_tuple
    from tests.ops import samples

    for name, op in OPS.items():
        if why_not(backend, CPU, name) is not None:
            continue
        for number, call in enumerate(samples.of(name)):
            ours = in_a_tuple(call.fresh()(op, backend=backend))
            exact, eager = (in_a_tuple(c.fresh()(op.reference)) for c in (call.to(torch.float64), call))
            compare(f"{op.family}: {name}, sample {number}", ours, eager, exact)


def exact_loss(features: Tensor, output: Tensor, target: Tensor) -> Tensor:
    variance = features.flatten(1).var(1)
    low, high = variance.min(), variance.max()
    weight = torch.exp(0.3 * (variance - low) / (high - low)) - 0.3
    return (weight * F.cross_entropy(output, target, reduction="none")).mean()


def loss(backend: str) -> None:
    features, target = torch.randn(6, 5, 3, 2), torch.arange(6) % 4
    scores = torch.randn(6, 4)

    def step(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf = scores.to(dtype).requires_grad_()
        value = function(features.to(dtype), leaf, target)
        return [value, *torch.autograd.grad(value, leaf)]

    exact, eager = step(exact_loss, torch.float64), step(exact_loss, torch.float32)
    compare("FusedBiasLoss()", step(FusedBiasLoss(backend=backend), torch.float32), eager, exact)
    ours = step(lambda *tensors: functional.bias_loss(*tensors, backend=backend).loss, torch.float32)
    compare("functional.bias_loss", ours, eager, exact)
    variance = functional.feature_variance(features, backend=backend)
    of_torch = (features.flatten(1).var(1), features.double().flatten(1).var(1))
    compare("functional.feature_variance", [variance], *([value] for value in of_torch))


def depthwise(backend: str) -> None:
    layer, x = DepthwiseConv2d(5, 5, 3, 2, 1, groups=5, backend=backend), torch.randn(2, 5, 6, 7)
    plain = nn.Conv2d(5, 5, 3, 2, 1, groups=5)
    plain.load_state_dict(layer.state_dict())

    def step(module: nn.Module, x: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        return [y, *torch.autograd.grad(y.square().sum(), (leaf, *module.parameters()))]

    exact = step(copy.deepcopy(plain).double(), x.double())
    compare("nn.DepthwiseConv2d", step(layer, x), step(plain, x), exact)
    ours = functional.depthwise_conv2d(x, layer.weight, layer.bias, 2, backend=backend)
    compare("functional.depthwise_conv2d", [ours], [plain(x)], [plain.double()(x.double())])


def skipblocknet(seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    options = {"num_classes": 10, "small_input": True, "return_features": "variance", "drop_rate": 0.0}
    plain, fused = skipblocknet_xs(fused=False, **options), skipblocknet_xs(fused=True, **options)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def accelerated(make: Callable[[], nn.Module], layer: str) -> Callable[[int], tuple[nn.Module, nn.Module]]:
    def pair(seed: int) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(seed)
        plain = make()
        fused = copy.deepcopy(plain)
        assert accelerate(fused).swapped
        return FeatureTap(plain, layer), FeatureTap(fused, layer)

    return pair


def lookalike() -> nn.Module:
    from tests.nn import lookalikes

    made = lookalikes.network()
    made[5].stochastic_depth = nn.Identity()
    return made


def torchvision_model() -> nn.Module:
    from torchvision.models import mobilenet_v2

    made: nn.Module = mobilenet_v2(width_mult=0.35, num_classes=10, dropout=0.0)
    return made


def timm_model() -> nn.Module:
    from timm import create_model

    made: nn.Module = create_model("mobilenetv3_small_050", num_classes=10, drop_rate=0.0)
    return made


# By name, what makes a plain network and the same on fused blocks.
NETWORKS = {
    "skipblocknet_xs": skipblocknet,
    "blocks of other libraries": accelerated(lookalike, "9"),
    "torchvision": accelerated(torchvision_model, "features"),
    "timm": accelerated(timm_model, "blocks"),
}


# Large enough for statistics of more than a few values in the last layers: two values are as good as none.
IMAGES = dict.fromkeys(NETWORKS, (2, 3, 32, 32)) | dict.fromkeys(("torchvision", "timm"), (4, 3, 64, 64))


def step(model: nn.Module, images: Tensor, target: Tensor) -> list[Tensor]:
    features, scores = model.train()(images.to(next(model.parameters()).dtype))
    if isinstance(model, FeatureTap):
        value = FusedBiasLoss()(features, scores, target)
    else:
        value = FusedBiasLoss()(None, scores, target, variance=features)
    return [value, *torch.autograd.grad(value, list(model.parameters()))]


def running_statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "running" in name]


def scores_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model.eval()(images.to(next(model.parameters()).dtype))
    return [found[1] if isinstance(found, tuple) else found]


def network(name: str, draws: int) -> None:
    """A network with the loss, in training and in evaluation, on what "auto" takes. Errors are means over the draws: one
    draw's largest is luck, PyTorch's as ours."""
    names = ("training step", "running statistics", "evaluation", "optimize_for_inference")
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for seed in range(draws):
        plain, fused = NETWORKS[name](seed)
        models = (fused, plain, copy.deepcopy(plain).double())
        images, target = torch.randn(*IMAGES[name]), torch.arange(IMAGES[name][0])
        results = {"training step": [step(model, images, target) for model in models]}
        results["running statistics"] = [running_statistics(model) for model in models]
        results["evaluation"] = [scores_of(model, images) for model in models]
        optimized = optimize_for_inference(fused.model if isinstance(fused, FeatureTap) else fused)
        results["optimize_for_inference"] = [scores_of(optimized, images), *results["evaluation"][1:]]
        for part, (ours, eager, exact) in results.items():
            errors[part].append((norm_of_difference(ours, exact), norm_of_difference(eager, exact)))
    for part, pairs in errors.items():
        ours, own = (sum(column) / draws for column in zip(*pairs, strict=True))
        report(f"{name}: {part}", ours, own)


def main() -> None:
    backend, draws, networks = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    assert biasloss_ext.__version__
    torch.manual_seed(0)
    for name in networks:
        network(name, draws)
    if networks:
        return
    loss(backend)
    if why_not(backend, CPU, "depthwise") is None:
        depthwise(backend)
    ops(backend)


if __name__ == "__main__":
    main()
