"""Which fused modules of a model pay, by time on images like those that it will see."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.benchmarks.timing import in_turns

ROUNDS = 5
UNSAFE_CHANNELS = 16


def slower_when_fused(model: nn.Module, names: list[str], images: Tensor) -> dict[str, str]:
    """Those modules of a model that are faster on their plain layers, each with a sentence that says by how much.

    A copy of the model sees the images, so that no statistics move. Each module is timed alone, on the input that it is given
    in the model, alternating between its forms: forward and backward in training mode, forward alone in evaluation. A module
    whose plain layers may write past their memory is not timed and stays fused.

    Args:
        model: in the mode that is timed.
        names: of its fused modules; they have an attribute ``fused``.
        images: a batch on the device of the model.
    """
    measured = copy.deepcopy(model)
    found = {}
    with torch.random.fork_rng():
        for name, inputs in _inputs(measured, names, images).items():
            module = measured.get_submodule(name)
            if _is_unsafe_when_plain(module):
                continue
            calls = {form: _call(module, fused, inputs) for form, fused in (("fused", "auto"), ("plain", False))}
            medians = {form: statistics.median(times) for form, times in in_turns(calls, images.device, ROUNDS).items()}
            if medians["plain"] < medians["fused"]:
                step = "forward and backward" if module.training else "forward"
                found[name] = (
                    f"the plain layers are faster: {medians['plain']:.2g} ms, fused {medians['fused']:.2g} ms, {step} on "
                    f"{tuple(inputs[0].shape)}"
                )
    return found


def _is_unsafe_when_plain(module: nn.Module) -> bool:
    """Whether PyTorch's CPU kernels may write past their memory in a training step of the plain layers.

    oneDNN does so for the weight gradient of strided 1x1 convolutions of few channels in channels_last:
    https://github.com/uxlfoundation/oneDNN/issues/6035. Seen with torch 2.13 and 2.14.
    """
    return module.training and any(
        isinstance(layer, nn.Conv2d)
        and layer.weight.device.type == "cpu"
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.groups == 1
        and layer.in_channels < UNSAFE_CHANNELS
        for layer in module.modules()
    )


def _inputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What each module is called with, by its name; modules that are given more than tensors, or return more, are left out."""
    found: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
            if not options and isinstance(out, Tensor) and all(isinstance(x, Tensor) for x in inputs):
                found[name] = tuple([x.detach().requires_grad_(x.requires_grad) for x in inputs])

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names]
    with torch.set_grad_enabled(model.training):
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def _call(module: nn.Module, fused: Any, inputs: tuple[Tensor, ...]) -> Callable[[int], object]:
    """A step of a module in one of its forms."""
    wanted = [tensor for tensor in (*inputs, *module.parameters()) if tensor.requires_grad]

    def forward(_: int) -> Tensor:
        module.fused = fused
        out: Tensor = module(*inputs)
        return out

    if not module.training or not wanted:
        return torch.no_grad()(forward)
    grad = torch.randn_like(forward(0))

    def step(_: int) -> object:
        return torch.autograd.grad(forward(0), wanted, grad, allow_unused=True)

    return step
