"""SkipblockNet-M and its peers: inference, or forward and backward with cross-entropy."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext.acceleration import accelerate
from biasloss_ext.benchmarks.contender import Built, Contender, Cost, Inputs, Op, Workload
from biasloss_ext.benchmarks.peers import runtimes
from biasloss_ext.benchmarks.peers.authors import AuthorsBiasLoss
from biasloss_ext.benchmarks.peers.compiled import MODES, compiled
from biasloss_ext.benchmarks.peers.mobilenet import mobilenet_v3_large
from biasloss_ext.inference import optimize_for_inference
from biasloss_ext.loss import FusedBiasLoss
from biasloss_ext.models import count_multiply_adds, skipblocknet_m

Build = Callable[[int], nn.Module]
MakeLoss = Callable[[], Callable[[Any, Tensor], Tensor]]

SEED = 0
# Rounding grows through fifty layers; a wrong layer is off by far more than this. Under autocast training amplifies it
# further still. In float32 gradients of few small images are right to 1e-5, or to 1e-3 and sometimes 2e-2 where a value
# lies at a kink of its activation.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
DRAWS = 4


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    images = torch.randn(workload.batch, *workload.sample, device=device)
    return images, torch.randint(workload.classes, (workload.batch,), device=device)


def cost(workload: Workload) -> Cost:
    return cost_of(plain, workload)


def cost_of(build: Build, workload: Workload) -> Cost:
    """Backward takes the products twice more. Bytes are those of the layers that multiply, all others fused into them."""
    with torch.device("meta"):
        model = build(workload.classes)
    channels, height, width = workload.sample
    multiply_adds = count_multiply_adds(model, (channels, height, width))
    passes = 3 if workload.backward else 1
    elements = passes * (_elements(model, workload) + sum(p.numel() for p in model.parameters()))
    return Cost(elements * workload.dtype.itemsize, passes * 2 * multiply_adds * workload.batch, "matmul")


def _elements(model: nn.Module, workload: Workload) -> int:
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(inputs[0].numel() + output.numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.empty(workload.batch, *workload.sample, device="meta"))
    return sum(counts)


def plain(classes: int) -> nn.Module:
    """The network of plain PyTorch layers."""
    return skipblocknet_m(classes, drop_rate=0.0, fused=False)


def _fused(classes: int) -> nn.Module:
    return skipblocknet_m(classes, drop_rate=0.0, fused=True)


def _accelerated_mobilenet(classes: int) -> nn.Module:
    model = mobilenet_v3_large(classes)
    accelerate(model)
    return model


def _cross_entropy() -> Callable[[Any, Tensor], Tensor]:
    return F.cross_entropy


def _network(workload: Workload, build: Build) -> nn.Module:
    """Weights drawn at random, the same for every contender, and statistics as after some training."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = build(workload.classes).train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(4, *workload.sample))
    return model.train(workload.backward)


def _of_weights(drawn: nn.Module, build: Build, workload: Workload) -> nn.Module:
    model = build(workload.classes)
    model.load_state_dict(drawn.state_dict())
    return model.train(workload.backward)


def _built(
    workload: Workload, device: torch.device, model: nn.Module, exact: nn.Module, run: Any, make_loss: MakeLoss
) -> Built:
    """``run`` is ``model``, perhaps compiled; ``exact`` has the same weights; the loss takes what they return."""
    reference = copy.deepcopy(exact).to(device).double()
    loss, exact_loss = make_loss(), make_loss()  # Bias Loss has a state
    own, exact_own = list(model.parameters()), list(reference.parameters())

    def work(run: Any, loss: Any, images: Tensor, target: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
        if not workload.backward:
            with torch.inference_mode():
                return [run(images)]
        value = loss(run(images), target)
        return [value, *torch.autograd.grad(value, parameters)]

    def autocast() -> contextlib.AbstractContextManager[Any]:
        if workload.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, workload.dtype)

    def step(inputs: Inputs) -> list[Tensor]:
        with autocast():
            return work(run, loss, inputs[0], inputs[1], own)

    def exactly(inputs: Inputs) -> list[Tensor]:
        return work(reference, exact_loss, inputs[0].double(), inputs[1], exact_own)

    return Built(step, exactly)


def in_torch(
    build: Build, weights: Build = plain, channels_last: bool = True, mode: str | None = None
) -> Callable[[Workload, torch.device], Built]:
    """``build`` in plain PyTorch or compiled, with the weights that ``weights`` draws."""

    def contender(workload: Workload, device: torch.device) -> Built:
        drawn = _network(workload, weights)
        model = drawn if build is weights else _of_weights(drawn, build, workload)
        exact = copy.deepcopy(drawn)
        model.to(device)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        run = model if mode is None else compiled(model, mode)
        return _built(workload, device, model, exact, run, _cross_entropy)

    return contender


def _optimized(workload: Workload, device: torch.device) -> Built:
    drawn = _network(workload, plain)
    model = optimize_for_inference(_of_weights(drawn, _fused, workload).to(device))
    return _built(workload, device, model, drawn, model, _cross_entropy)


def _with_loss(build: Build, make_module: Callable[[], nn.Module]) -> Callable[[Workload, torch.device], Built]:
    """Training with Bias Loss instead of cross-entropy."""

    def contender(workload: Workload, device: torch.device) -> Built:
        drawn = _network(workload, plain)
        drawn.return_features = "features"  # type: ignore[assignment]
        model = _of_weights(drawn, build, workload).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.return_features = "features"  # type: ignore[assignment]

        def make() -> Callable[[Any, Tensor], Tensor]:
            loss_fn = make_module().to(device)
            return lambda returned, target: loss_fn(*returned, target)

        return _built(workload, device, model, drawn, model, make)

    return contender


def _runtime(start: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]) -> Callable[..., Built]:
    def contender(workload: Workload, device: torch.device) -> Built:
        model = _network(workload, plain)
        scores = start(model, torch.randn(workload.batch, *workload.sample, device=device))
        return _built(workload, device, model, model, scores, _cross_entropy)

    return contender


CONTENDERS = (
    Contender("biasloss_ext, optimized", "ours", _optimized, capturable=True, passes="forward", channels_last=True),
    Contender("biasloss_ext, fused", "ours", in_torch(_fused), capturable=True, passes="backward", channels_last=True),
    Contender(
        "biasloss_ext, fused", "variant", in_torch(_fused), capturable=True, passes="forward", channels_last=True
    ),
    Contender("fused + Bias Loss", "variant", _with_loss(_fused, FusedBiasLoss), passes="backward", channels_last=True),
    Contender(
        "eager + authors' loss", "context", _with_loss(plain, AuthorsBiasLoss), passes="backward", channels_last=True
    ),
    Contender("eager NCHW", "peer", in_torch(plain, channels_last=False), capturable=True),
    Contender("eager channels_last", "peer", in_torch(plain), capturable=True, channels_last=True),
    Contender("ONNX Runtime", "peer", _runtime(runtimes.onnx_runtime), own_threads=True, passes="forward"),
    Contender("OpenVINO", "peer", _runtime(runtimes.openvino), own_threads=True, passes="forward"),
    Contender("ncnn", "peer", _runtime(runtimes.ncnn), own_threads=True, passes="forward"),
    Contender(
        "torchvision MobileNetV3-Large",
        "context",
        in_torch(mobilenet_v3_large, weights=mobilenet_v3_large),
        capturable=True,
        channels_last=True,
    ),
    Contender(
        "MobileNetV3-Large, accelerate",
        "context",
        in_torch(_accelerated_mobilenet, weights=mobilenet_v3_large),
        capturable=True,
        channels_last=True,
    ),
    # Last, so that a time limit leaves out none of the others.
    *(
        Contender(
            name,
            "peer",
            in_torch(plain, mode=mode),
            channels_last=True,
            slow_on=("cpu", "cuda") if mode == "max-autotune" else ("cpu",) if passes == "backward" else (),
            passes=passes,
        )
        for name, mode in MODES.items()
        for passes in ("forward", "backward")
    ),
)

OP = Op("skipblocknet", CONTENDERS, make_inputs, cost, TOLERANCE, DRAWS)
