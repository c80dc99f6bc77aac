"""Training steps as one CUDA graph: forward pass, loss and backward pass are launched by a single call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from biasloss_ext.recipes.processes import Processes
from biasloss_ext.recipes.recipe import Recipe

WARM_UP_STEPS = 3  # run eagerly: kernels are compiled, workspaces and the optimizer's state allocated
Result = tuple[Tensor, Tensor | None]
Compute = Callable[[Tensor, Tensor], Result]


class Capture(Protocol):
    """How work is captured; `CudaCapture`, or a stand-in for it."""

    def warm_up(self, work: Callable[[], Result]) -> Result:
        """Run the work as it will be captured."""

    def capture(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """(what repeats the work, the tensors that it then overwrites); the work itself has not run yet."""


class CudaCapture:
    """Captures on a stream of its own, on which the work has to be warmed up: gradients are added on the stream of the first
    backward pass."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], Result]) -> Result:
        with self._beside_the_current_stream():
            return work()

    def capture(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = work()
        return graph.replay, result

    @contextmanager
    def _beside_the_current_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


def why_not_captured(recipe: Recipe, here: Processes) -> str | None:
    """Why the steps of a run cannot be captured, or None when they can."""
    if here.device.type != "cuda":
        return f"they need a GPU, and this run is on {here.device.type}"
    if here.count > 1:
        return "processes exchange gradients between the backward pass and the step; run one process"
    if recipe.accumulate > 1:
        return "a batch in several parts adds up gradients between captures; use --accumulate 1"
    if recipe.compile:
        return "torch.compile captures graphs of its own; leave out --compile"
    return None


class CapturedSteps:
    """Calls ``compute`` eagerly for the first batches, then captures it and replays the capture.

    Batches of another shape than the captured one run eagerly. So does everything after a capture that failed.

    Args:
        compute: takes images and target, leaves gradients in the parameters and returns ``(loss, weights)``.
        parameters: of the model. Their gradients must be None at each call, as `Optimizer.zero_grad` leaves them.
        capture: how to capture.
        say: takes one sentence for the user.
    """

    def __init__(
        self, compute: Compute, parameters: list[nn.Parameter], capture: Capture, say: Callable[[str], None]
    ) -> None:
        self.compute, self.capture, self.say = compute, capture, say
        self.parameters = parameters
        self.warm_ups = 0
        self.failed = False
        self.replay: Callable[[], None] | None = None
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.result: Result | None = None
        self.gradients: list[Tensor | None] = []

    def __call__(self, images: Tensor, target: Tensor) -> Result:
        if self.failed:
            return self.compute(images, target)
        if self.warm_ups < WARM_UP_STEPS:
            self.warm_ups += 1
            return self.capture.warm_up(lambda: self.compute(images, target))
        if self.replay is None:
            self._capture(images, target)
        if self.replay is None or self.inputs is None or self.result is None or self._differ(images, target):
            return self.compute(images, target)
        for static, given in zip(self.inputs, (images, target), strict=True):
            static.copy_(given)
        self.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        loss, weights = self.result
        # The next replay overwrites them.
        return loss.clone(), None if weights is None else weights.clone()

    def _capture(self, images: Tensor, target: Tensor) -> None:
        inputs = images.clone(), target.clone()  # in the memory format of the images
        try:
            replay, (loss, weights) = self.capture.capture(lambda: self.compute(*inputs))
        except RuntimeError as error:
            self.failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"--cuda-graphs: the step cannot be captured, and runs eagerly: {reason}")
        else:
            self.replay, self.inputs = replay, inputs
            self.result = loss.detach(), weights
            self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    def _differ(self, images: Tensor, target: Tensor) -> bool:
        def kind(t: Tensor) -> tuple[Any, ...]:
            return t.shape, t.dtype, t.device

        assert self.inputs is not None
        return any(kind(a) != kind(b) for a, b in zip(self.inputs, (images, target), strict=True))
