"""Run by :mod:`tests.wheel` where the wheel is installed: the loss and a block, forward and backward, on the compiled kernels."""

import platform
import shutil
from collections.abc import Callable

import torch

from biasloss_ext import FusedBiasLoss, accelerate
from biasloss_ext.info import report
from biasloss_ext.models import skipblocknet_xs
from biasloss_ext.ops.backends import choose

RELATIVE = 1e-4


def difference(fused: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    pairs = zip(fused, reference, strict=True)
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)


def loss_of(backend: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    features = torch.randn(16, 24, 7, 7)
    output = torch.randn(16, 100, requires_grad=True)
    loss = FusedBiasLoss(backend=backend)(features, output, torch.arange(16))
    loss.backward()
    return [loss.detach(), output.grad]


def block_of(fused: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d
    block = torch.nn.Sequential(
        *(conv(16, 64, 1, bias=False), norm(64), torch.nn.SiLU()),
        *(conv(64, 64, 3, padding=1, groups=64, bias=False), norm(64), torch.nn.SiLU()),
        *(conv(64, 16, 1, bias=False), norm(16)),
    )
    network = torch.nn.Sequential(block)
    images, cotangent = torch.randn(4, 16, 14, 14).requires_grad_(), torch.randn(4, 16, 14, 14)
    if fused:
        assert accelerate(network, fused=True).swapped, "no block was replaced"
    network(images).backward(cotangent)
    return [images.grad, *(parameter.grad for parameter in network.parameters())]


def check(name: str, compute: Callable[..., list[torch.Tensor]], fused: object, reference: object) -> None:
    found = difference(compute(fused), compute(reference))
    print(f"  {name}: relative difference from plain PyTorch {found:.1e}")
    assert found < RELATIVE, name


assert not [name for name in ("c++", "g++", "gcc", "clang", "nvcc") if shutil.which(name)], "a compiler is on the PATH"
print(f"Python {platform.python_version()}, torch {torch.__version__}")
print("\n".join(f"  {line}" for line in report().splitlines() if "kernels: " in line))
assert choose("auto", torch.device("cpu")) == "cpu"
check("loss", loss_of, "cpu", "reference")
check("block", block_of, True, False)
model = skipblocknet_xs(num_classes=10, return_features="variance")
variance, scores = model(torch.randn(2, 3, 64, 64))
FusedBiasLoss()(None, scores, torch.tensor([1, 2]), variance=variance).backward()
assert all(parameter.grad.isfinite().all() for parameter in model.parameters()), "a gradient is not finite"
