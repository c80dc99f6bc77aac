"""Post-training static quantization of a network that has been optimized for inference."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from biasloss_ext.nn.program import NetworkProgram
from biasloss_ext.nn.quantization.program import QuantizationReport, QuantizedProgram, programs_of, report_of
from biasloss_ext.ops.backends import why_not
from biasloss_ext.ops.native import native

MOST_BATCHES = 16
BATCH = 32  # of images that are given as one tensor


def check_int8_support() -> None:
    """Raise where int8 kernels cannot run.

    Raises:
        RuntimeError: the message says what there is instead.
    """
    problem = why_not("cpu", torch.device("cpu"), "program")
    if problem is None and not native().build.get("cpu_int8"):
        problem = f"it needs a CPU with AVX2, and this process runs {native().build['cpu_variant_in_use']} kernels"
    if problem is not None:
        raise RuntimeError(
            f"dtype torch.int8 is not supported here: {problem}; there are torch.float32 and torch.float64"
        )


@torch.no_grad()
def quantize(optimized: nn.Module, calibrate_on: Tensor | Iterable[Any]) -> None:
    """Replace the programs of a network by those on bytes.

    Raises:
        TypeError: what is to calibrate on yields something else than images.
        ValueError: there are no images, or the network has no programs.
    """
    for module in optimized.modules():
        if isinstance(module.__dict__.get("forward"), NetworkProgram):
            before, quantized = module.forward, QuantizedProgram(module)
            module.forward = quantized  # type: ignore[method-assign, assignment]
            if quantized.made.function is None:
                module.forward = before  # type: ignore[method-assign]
    if not any(True for _ in programs_of(optimized)):
        raise ValueError("dtype torch.int8: no layers of the model have int8 kernels; see biasloss accelerate for why")
    batches = 0
    for images in _batches(calibrate_on):
        optimized(images)
        batches += 1
    if batches == 0:
        raise ValueError("calibrate_on has no images; give a few batches of the training set")
    for program in programs_of(optimized):
        if not all(segment.seen for segment in program.made.segments):
            raise ValueError("calibrate_on does not reach all layers of the model; give images that do")
        program.freeze()
    optimized.requires_grad_(False)


def _batches(calibrate_on: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    if isinstance(calibrate_on, Tensor):
        yield from (part for part in calibrate_on.split(BATCH) if len(part))
        return
    for batch in itertools.islice(calibrate_on, MOST_BATCHES):
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(images, Tensor):
            raise TypeError(
                f"calibrate_on must yield tensors of images, alone or first of a tuple, got {type(images).__name__}"
            )
        if len(images):
            yield images


def quantization_report(model: nn.Module) -> QuantizationReport:
    """Which layers of a model from ``optimize_for_inference(model, dtype=torch.int8, ...)`` run on bytes.

    Args:
        model: such a model.

    Returns:
        The counts of layers by kind, ``int8`` and ``float32``, and the names of those ``outside`` of programs; it prints well.

    Raises:
        ValueError: the model has not been quantized.
    """
    if not any(True for _ in programs_of(model)):
        raise ValueError("model must come from optimize_for_inference(..., dtype=torch.int8)")
    return report_of(model)
