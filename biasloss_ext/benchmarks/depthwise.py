"""Depthwise convolution and its peers: what `DepthwiseConv2d` replaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasloss_ext.benchmarks.contender import Built, Contender, Cost, Inputs, Op, Workload
from biasloss_ext.nn import DepthwiseConv2d
from biasloss_ext.ops.depthwise import op
from biasloss_ext.ops.library import accumulation_dtype

SEED = 0
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    """Images and the gradient of the output."""
    images = torch.randn(workload.batch, *workload.sample, device=device, dtype=workload.dtype)
    gradient = torch.randn(_output_shape(workload), device=device, dtype=workload.dtype)
    return images.requires_grad_(workload.backward), gradient


def cost(workload: Workload) -> Cost:
    """Images and weights read, output written; backward reads the output's gradient besides and writes the images'.

    A gradient alone takes as much as the forward pass: of its three maps one is written, the others are read.
    """
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


def _convolution(workload: Workload, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    channels, kernel_size = workload.sample[0], workload.option("kernel_size")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return kind(
            channels,
            channels,
            kernel_size,
            workload.option("stride"),
            padding=kernel_size // 2,
            groups=channels,
            bias=False,
        )


def _ours(workload: Workload, device: torch.device) -> Built:
    return _built(workload, device, _convolution(workload, DepthwiseConv2d), _our_gradient)


def _torch(workload: Workload, device: torch.device) -> Built:
    return _built(workload, device, _convolution(workload), _torch_gradient)


Gradient = Callable[[Tensor, Tensor], Tensor]  # of images and the gradient of the output


def _our_gradient(workload: Workload, weight: Tensor) -> Gradient:
    want_x, want_weight = workload.gradient == "input", workload.gradient == "weight"
    stride, wide = workload.option("stride"), weight.detach().to(accumulation_dtype(workload.dtype))

    def gradient_alone(images: Tensor, gradient: Tensor) -> Tensor:
        gradients = op.backward(images, wide, grad=gradient, stride=stride, want_x=want_x, want_weight=want_weight)
        found: Tensor = gradients[0 if want_x else 1]
        return found

    return gradient_alone


def _torch_gradient(workload: Workload, weight: Tensor) -> Gradient:
    wanted = [workload.gradient == "input", workload.gradient == "weight", False]
    stride, padding = workload.option("stride"), workload.option("kernel_size") // 2
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], workload.sample[0])

    def gradient_alone(images: Tensor, gradient: Tensor) -> Tensor:
        gradients = torch.ops.aten.convolution_backward(gradient, images, weight, None, *geometry, wanted)
        found: Tensor = gradients[wanted.index(True)]
        return found

    return gradient_alone


def _built(
    workload: Workload,
    device: torch.device,
    layer: nn.Module,
    make_gradient: Callable[[Workload, Tensor], Gradient],
) -> Built:
    layer.to(device, workload.dtype)
    weight = layer.get_parameter("weight")
    gradient_alone = make_gradient(workload, weight)
    kernel_size, stride = workload.option("kernel_size"), workload.option("stride")

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        images, gradient = inputs
        if workload.gradient:
            with torch.inference_mode():
                return (gradient_alone(images, gradient),)
        if not workload.backward:
            with torch.inference_mode():
                return (layer(images),)
        output = layer(images)
        return (output, *torch.autograd.grad(output, (images, weight), gradient))

    def exact(inputs: Inputs) -> tuple[Tensor, ...]:
        images, parameter = (tensor.detach().double().requires_grad_() for tensor in (inputs[0], weight))
        output = F.conv2d(images, parameter, stride=stride, padding=kernel_size // 2, groups=images.shape[1])
        if not (workload.backward or workload.gradient):
            return (output,)
        of_images, of_weight = torch.autograd.grad(output, (images, parameter), inputs[1].double())
        if workload.gradient:
            return (of_images if workload.gradient == "input" else of_weight,)
        return output, of_images, of_weight

    return Built(step, exact)


# Compilers hand a convolution alone to the same libraries; they compete over the whole network.
CONTENDERS = (
    Contender("biasloss_ext", "ours", _ours, capturable=True, channels_last=True),
    Contender("Conv2d NCHW", "peer", _torch, capturable=True),
    Contender("Conv2d channels_last", "peer", _torch, capturable=True, channels_last=True),
)

OP = Op("depthwise", CONTENDERS, make_inputs, cost, TOLERANCE)
