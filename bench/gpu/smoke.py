"""Stage 2: whether everything works at all, in one process: every op against float64, and the front door as a user takes it."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu import arguments, op_calls
from bench.gpu.arguments import Arguments
from bench.gpu.op_calls import Call, Shape
from biasloss_ext import FusedBiasLoss, accelerate
from biasloss_ext.benchmarks.contender import Unavailable
from biasloss_ext.benchmarks.peers.mobilenet import mobilenet_v3_large
from biasloss_ext.inference import optimize_for_inference
from biasloss_ext.info import report
from biasloss_ext.models import skipblocknet_m
from biasloss_ext.nn import FusedInvertedResidual, InvertedResidual
from biasloss_ext.ops import backends
from biasloss_ext.ops.registry import OPS, Op
from biasloss_ext.recipes.graphs import CudaCapture

SHAPES = (Shape(3, 65, 24, 9, 5, 2, 33), Shape(8, 240, 40, 28, 5, 1, 100), Shape(4, 64, 24, 112, 3, 2, 1000))
TINY_SHAPES = (Shape(2, 5, 6, 3, 3, 1, 7),)
UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
GPU_BACKENDS = ("cuda", "triton")


class Skipped(Exception):
    """Why a check does not apply here."""


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def assert_close(name: str, found: Tensor, exact: Tensor, own: Tensor, roundoff: float) -> None:
    """Within twice the error of PyTorch in the same precision, and some roundings of the largest value."""
    if found.shape != own.shape or found.dtype != own.dtype:
        raise AssertionError(f"{name}: {found.dtype} {tuple(found.shape)}, expected {own.dtype} {tuple(own.shape)}")
    if found.numel() == 0:
        return
    error, of_torch = (float((t.double() - exact).abs().max()) for t in (found, own))
    bound = 2 * of_torch + 16 * roundoff * float(exact.abs().max())
    if not error <= bound:
        raise AssertionError(f"{name}: error {error:.3g}, at most {bound:.3g} is allowed (PyTorch's: {of_torch:.3g})")


def wide(tensor: Tensor) -> Tensor:
    """In float64, but for integers."""
    return tensor.double() if tensor.is_floating_point() else tensor


def check_op(given: Arguments, op: Op, backend: str, call: Call, dtype: torch.dtype) -> None:
    on_device = [call.to(lambda t: t.to(given.device)) for _ in range(2)]
    exactly = call.to(lambda t: wide(t).to(given.device))
    found = tensors(op(*on_device[0].arguments, backend=backend, **on_device[0].options))
    own = tensors(op.reference(*on_device[1].arguments, **on_device[1].options))
    exact = tensors(op.reference(*exactly.arguments, **exactly.options))
    for index, outputs in enumerate(zip(found, exact, own, strict=True)):
        assert_close(f"output {index}", *outputs, UNIT_ROUNDOFF[dtype])
    for name in op_calls.WRITTEN:
        if name in on_device[0].options:
            changed = [call.options[name] for call in (on_device[0], exactly, on_device[1])]
            assert_close(name, *changed, UNIT_ROUNDOFF[dtype])


def op_checks(given: Arguments) -> list[tuple[str, Callable[[], None]]]:
    """One an op and backend, over all shapes and dtypes."""
    calls = [
        (dtype, name, call)
        for shape in (TINY_SHAPES if given.tiny else SHAPES)
        for dtype in UNIT_ROUNDOFF
        for name, call in op_calls.calls(shape, dtype)
    ]

    def check(op: Op, backend: str) -> None:
        reason = backends.why_not(backend, given.device, op.name)
        if reason is not None:
            raise AssertionError(f"it cannot run: {reason}")
        for dtype, name, call in calls:
            if name == op.name:
                check_op(given, op, backend, call, dtype)

    return [
        (f"{op.name} on {backend}", lambda op=op, backend=backend: check(op, backend))  # type: ignore[misc]
        for op in OPS.values()
        for backend in GPU_BACKENDS
        if backend in op.backends
    ]


def tiny_network(classes: int, fused: bool) -> nn.Module:
    block = FusedInvertedResidual if fused else InvertedResidual
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4, padding=1, bias=False),
        block(6, 12, 6, 3, squeeze_excite=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


class Front:
    """What a user calls first."""

    def __init__(self, given: Arguments) -> None:
        self.device = given.device
        self.tiny = given.tiny
        self.classes = 10
        size = 16 if given.tiny else 224
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4, 3, size, size, generator=generator).to(given.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.target = torch.arange(4, device=given.device)

    def checks(self) -> list[tuple[str, Callable[[], None]]]:
        names = ("info", "loss", "inference", "training_step", "mixed_precision", "accelerated", "graph")
        return [(name.replace("_", " "), getattr(self, name)) for name in names]

    def network(self, fused: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = skipblocknet_m(self.classes, drop_rate=0.0, fused=fused)
        if self.tiny:  # a whole network takes minutes on interpreted kernels
            model = tiny_network(self.classes, fused)
        return model.to(self.device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def info(self) -> None:
        text = report()
        for backend in GPU_BACKENDS:
            if backends.why_not(backend, self.device) is not None:
                raise AssertionError(f"{backend} cannot run:\n{text}")
        print(text)

    def loss(self) -> None:
        features, scores = torch.randn(4, 96, 7, 7, device=self.device), torch.randn(4, 10, device=self.device)
        found, exact, own = (
            self._loss(features.to(dtype), scores.to(dtype), backend)
            for dtype, backend in (
                (torch.float32, "auto"),
                (torch.float64, "reference"),
                (torch.float32, "reference"),
            )
        )
        for name, *values in zip(("loss", "gradient"), found, exact, own, strict=True):
            assert_close(name, *values, UNIT_ROUNDOFF[torch.float32])

    def _loss(self, features: Tensor, scores: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        scores = scores.detach().requires_grad_()
        loss_fn = FusedBiasLoss(backend=backend).to(self.device)
        loss = loss_fn(features, scores, self.target)
        return loss.detach(), *torch.autograd.grad(loss, scores)

    def inference(self) -> None:
        plain, fused = self.network(False).eval(), self.network(True).eval()
        exact = self.network(False, torch.float64).eval()
        with torch.inference_mode():
            expected, own = exact(self.images.double()), plain(self.images)
            for name, model in (("fused", fused), ("optimized", optimize_for_inference(fused))):
                assert_close(name, model(self.images), expected, own, 64 * UNIT_ROUNDOFF[torch.float32])

    def _step(self, model: nn.Module, images: Tensor, autocast: bool = False) -> list[Tensor]:
        """The loss and all gradients, one after another."""
        narrow = torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext()
        with narrow:
            loss = F.cross_entropy(model.train()(images), self.target)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])]

    def training_step(self) -> None:
        """Rounding may put a value on the other side of an activation's kink, hence relative errors of the whole."""
        exact = self._step(self.network(False, torch.float64), self.images.double())
        found, own = (self._step(self.network(fused), self.images) for fused in (True, False))
        self._assert_near(found, exact, own, 1e-3)

    def mixed_precision(self) -> None:
        exact = self._step(self.network(False, torch.float64), self.images.double())
        found, own = (self._step(self.network(fused), self.images, autocast=True) for fused in (True, False))
        self._assert_near(found, exact, own, 1e-2)

    def _assert_near(self, found: list[Tensor], exact: list[Tensor], own: list[Tensor], least: float) -> None:
        for name, *values in zip(("loss", "gradients"), found, exact, own, strict=True):
            result, expected, of_torch = (value.double() for value in values)
            size = expected.norm()
            error, bound = float((result - expected).norm() / size), float((of_torch - expected).norm() / size)
            print(f"  {name}: relative error {error:.2g}, of plain layers {bound:.2g}")
            if not error <= 2 * bound + least:
                raise AssertionError(f"{name}: relative error {error:.3g}, of plain layers {bound:.3g}")

    def accelerated(self) -> None:
        torch.manual_seed(0)
        model = self.network(False) if self.tiny else self._mobilenet()
        model.eval()
        with torch.inference_mode():
            exact, own = copy.deepcopy(model).double()(self.images.double()), model(self.images)
            if not accelerate(model).swapped:
                raise AssertionError("accelerate exchanged no block")
            assert_close("scores", model(self.images), exact, own, 64 * UNIT_ROUNDOFF[torch.float32])

    def _mobilenet(self) -> nn.Module:
        try:
            model = mobilenet_v3_large(self.classes)
        except Unavailable as reason:
            raise Skipped(str(reason)) from None
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def graph(self) -> None:
        """A captured training step replays on new images."""
        if self.device.type != "cuda":
            raise Skipped("a CUDA graph needs a GPU")
        model, images = self.network(True), self.images.clone()
        weights = torch.zeros(())

        def work() -> tuple[Tensor, Tensor | None]:
            model.zero_grad()
            loss = F.cross_entropy(model.train()(images), self.target)
            loss.backward()
            return loss.detach(), weights

        capture = CudaCapture()
        for _ in range(2):
            capture.warm_up(work)
        replay, (loss, _) = capture.capture(work)
        gradients = [parameter.grad for parameter in model.parameters()]
        images.copy_(self.images.flip(0))
        replay()
        torch.cuda.synchronize()
        captured = [loss.clone(), *(g.clone() for g in gradients if g is not None)]
        eagerly, _ = work()
        own = [eagerly, *(p.grad for p in model.parameters() if p.grad is not None)]
        for index, (a, b) in enumerate(zip(captured, own, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, i=index: f"tensor {i}: {m}")  # type: ignore[misc]


def main() -> None:
    given, _ = arguments.parsed(arguments.parser(__doc__))
    torch.backends.cudnn.allow_tf32 = False  # else PyTorch's own errors would be the bound
    results: dict[str, dict[str, Any]] = {}
    for name, check in [*op_checks(given), *Front(given).checks()]:
        start = time.perf_counter()
        status, reason = "ok", ""
        try:
            check()
        except Skipped as why:
            status, reason = "skipped", str(why)
        except Exception as error:  # the other checks shall still be made
            status, reason = "failed", f"{type(error).__name__}: {error}"
            traceback.print_exc()
        results[name] = {"status": status, "reason": reason, "seconds": round(time.perf_counter() - start, 2)}
        print(f"{status:<8} {name} {results[name]['seconds']} s {reason.splitlines()[0] if reason else ''}", flush=True)
        given.save(results)
    failed = [name for name, result in results.items() if result["status"] == "failed"]
    print(f"{len(failed)} of {len(results)} checks failed" + (f": {', '.join(failed)}" if failed else ""))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
