"""Depthwise convolution and its peers: what `DepthwiseConv2d` replaces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext.benchmarks.contender import Built, Contender, Cost, Inputs, Op, Unavailable, Workload

SEED = 0
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    """Images and the gradient of the output."""
    images = torch.randn(workload.batch, *workload.sample, device=device, dtype=workload.dtype)
    gradient = torch.randn(_output_shape(workload), device=device, dtype=workload.dtype)
    return images.requires_grad_(workload.backward), gradient


def cost(workload: Workload) -> Cost:
    """Images and weights read, output written; backward reads the output's gradient besides and writes the images'."""
    kernel_size = workload.option("kernel_size")
    shape = _output_shape(workload)
    outputs = shape.numel()
    weights = workload.sample[0] * kernel_size**2
    multiply_adds = outputs * kernel_size**2
    passes = 3 if workload.backward else 1
    # Backward needs the images once more, for the weights' gradient.
    elements = outputs + workload.activations + weights
    if workload.backward:
        elements += outputs + 2 * workload.activations + 2 * weights
    return Cost(elements * workload.dtype.itemsize, 2 * passes * multiply_adds, "copy")


def _output_shape(workload: Workload) -> torch.Size:
    channels, height, width = workload.sample
    stride = workload.option("stride")
    return torch.Size((workload.batch, channels, -(-height // stride), -(-width // stride)))


def _convolution(workload: Workload) -> nn.Conv2d:
    channels, kernel_size = workload.sample[0], workload.option("kernel_size")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return nn.Conv2d(
            channels,
            channels,
            kernel_size,
            workload.option("stride"),
            padding=kernel_size // 2,
            groups=channels,
            bias=False,
        )


def _ours(workload: Workload, device: torch.device) -> Built:
    try:
        from biasloss_ext.nn import DepthwiseConv2d  # type: ignore[attr-defined]
    except ImportError:
        raise Unavailable("DepthwiseConv2d is not in this build of biasloss_ext") from None
    layer = DepthwiseConv2d(workload.sample[0], workload.option("kernel_size"), workload.option("stride"))
    layer.load_state_dict(_convolution(workload).state_dict())
    return _built(workload, device, layer)


def _torch(workload: Workload, device: torch.device) -> Built:
    layer = _convolution(workload)
    return _built(workload, device, layer)


def _built(workload: Workload, device: torch.device, layer: nn.Module) -> Built:
    layer.to(device, workload.dtype)
    weight = layer.get_parameter("weight")
    kernel_size, stride = workload.option("kernel_size"), workload.option("stride")

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        images, gradient = inputs
        if not workload.backward:
            with torch.inference_mode():
                return (layer(images),)
        output = layer(images)
        return (output, *torch.autograd.grad(output, (images, weight), gradient))

    def exact(inputs: Inputs) -> tuple[Tensor, ...]:
        images = inputs[0].detach().double().requires_grad_(workload.backward)
        parameter = weight.detach().double().requires_grad_(workload.backward)
        output = F.conv2d(images, parameter, stride=stride, padding=kernel_size // 2, groups=images.shape[1])
        if not workload.backward:
            return (output,)
        return (output, *torch.autograd.grad(output, (images, parameter), inputs[1].double()))

    return Built(step, exact)


# Compilers hand a convolution alone to the same libraries; they compete over the whole network.
CONTENDERS = (
    Contender("biasloss_ext", "ours", _ours, capturable=True, channels_last=True),
    Contender("Conv2d NCHW", "peer", _torch, capturable=True),
    Contender("Conv2d channels_last", "peer", _torch, capturable=True, channels_last=True),
)

OP = Op("depthwise", CONTENDERS, make_inputs, cost, TOLERANCE)
