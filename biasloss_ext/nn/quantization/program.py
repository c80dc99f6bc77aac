"""Runs networks as programs on bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from biasloss_ext.nn.plan import only_map
from biasloss_ext.nn.program import Made, NetworkProgram
from biasloss_ext.nn.program_search import Run
from biasloss_ext.nn.quantization.code import QuantizedWriter
from biasloss_ext.nn.quantization.correction import corrections, with_correction
from biasloss_ext.nn.quantization.layers import layers_of
from biasloss_ext.nn.quantization.levels import Levels, Observer
from biasloss_ext.ops import maps
from biasloss_ext.ops.program.code import Operation
from biasloss_ext.ops.program.op import program
from biasloss_ext.ops.registry import is_traced
from biasloss_ext.ops.tracing import exporting, transformed


class Calibrated(NamedTuple):
    """What the calibration images say of a run.

    Attributes:
        levels: of each value.
        corrections: the factor and the addend of each output of each layer, by its value.
    """

    levels: dict[int, Levels]
    corrections: dict[int, Tensor]


class QuantizedSegment:
    """A run as code on bytes.

    Attributes:
        written: how its layers are computed.
    """

    def __init__(self, run: Run, calibrated: Calibrated) -> None:
        layers = layers_of(run.writer.instructions, run.writer.constants)
        layers = [with_correction(layer, calibrated.corrections) for layer in layers]
        output = run.writer.instructions[-1].output
        self.channels = run.writer.input_channels
        self.written = QuantizedWriter(layers, output, calibrated.levels)
        writer = self.written.writer
        self.constants, self.code = writer.constants, writer.code()
        readers = [i.operation for i in writer.instructions if 0 in (i.input, i.other)]
        self.reads_any_strides = set(readers) <= {Operation.QUANTIZE, Operation.CONVOLUTION}

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels or x.dtype is not torch.float32 or x.numel() == 0:
            raise ValueError(
                f"a network quantized to int8 expects float32 maps (N, {self.channels}, H, W) that are not empty, got "
                f"{x.dtype} of shape {tuple(x.shape)}"
            )
        x = x if self.reads_any_strides else maps.channels_last(x)
        result: Tensor = program.native(x, self.constants, self.code)
        return result


class ObservedSegment(Observer):
    """A run in float32, of which the values are looked at."""

    def __init__(self, run: Run) -> None:
        super().__init__(layers_of(run.writer.instructions, run.writer.constants), run.writer.instructions[-1].output)

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        y = super().__call__(x)
        return maps.channels_last(y) if y.dim() == 4 else y

    def calibrated(self) -> Calibrated:
        levels = self.levels()
        return Calibrated(levels, corrections(self.layers, levels, torch.cat(self.images)))


class QuantizedProgram(NetworkProgram):
    """The method ``forward`` of a network whose programs run on bytes; before `freeze`, they run in float32 and are observed.

    What does not compute those programs raises: there is nothing else that would return the same scores.
    """

    def __init__(self, network: nn.Module, calibrated: list[Calibrated] | None = None) -> None:
        super().__init__(network)
        self.calibrated = calibrated

    def __getstate__(self) -> dict[str, Any]:
        return {"network": self.network, "calibrated": self.calibrated}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["network"], state["calibrated"])  # type: ignore[misc]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        x = only_map(arguments, options)
        problem = self._problem(x)
        if problem is not None:
            raise RuntimeError(f"a network quantized to int8 cannot run: {problem}")
        with torch.no_grad():
            return self.made.function.forward(self.network, self.made, x)  # type: ignore[union-attr, arg-type]

    @property
    def made(self) -> Made:
        if self._made is None:
            self._made = Made(self.network, torch.float32, self._segment, any_convolution=True)
        return self._made

    def _segment(self, run: Run, index: int) -> Any:
        return ObservedSegment(run) if self.calibrated is None else QuantizedSegment(run, self.calibrated[index])

    def _problem(self, x: Any) -> str | None:
        if type(x) is not Tensor or x.device.type != "cpu" or x.dtype is not torch.float32:
            return "it expects one float32 tensor of images on the CPU"
        if torch.compiler.is_compiling() or is_traced(x) or exporting(x) or transformed(x):
            return "it can be neither compiled nor exported nor transformed; take the network in float32 for that"
        if torch.is_grad_enabled() and x.requires_grad:
            return "it has no gradients; detach the images, or take the network in float32"
        if not self.made.snapshot.holds():
            return "its layers have changed since its calibration; quantize the changed network again"
        if self.made.snapshot.is_hooked() or _has_any_global_hook():
            return "hooks on its layers would not be called; remove them, or take the network in float32"
        return None

    def freeze(self) -> None:
        """Quantize by what was observed."""
        self.calibrated = [segment.calibrated() for segment in self.made.segments]
        self._made = None


def programs_of(model: nn.Module) -> Iterator[QuantizedProgram]:
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, QuantizedProgram):
            yield forward


class QuantizationReport(NamedTuple):
    """How a quantized network is computed.

    Attributes:
        int8: how many layers of each kind run on bytes.
        float32: how many run in float32 within the same programs, with conversions before and after.
        outside: the names of layers and functions that PyTorch runs between programs, in float32.
    """

    int8: dict[str, int]
    float32: dict[str, int]
    outside: list[str]

    def __str__(self) -> str:
        def counted(counts: dict[str, int]) -> str:
            return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"

        outside = ", ".join(self.outside) or "nothing"
        return f"int8: {counted(self.int8)}\nfloat32: {counted(self.float32)}\noutside of programs: {outside}"


def report_of(model: nn.Module) -> QuantizationReport:
    int8: Counter[str] = Counter()
    float32: Counter[str] = Counter()
    outside: list[str] = []
    for each in programs_of(model):
        for segment in each.made.segments:
            int8.update({kind.value: count for kind, count in segment.written.int8.items()})
            float32.update({kind.value: count for kind, count in segment.written.float32.items()})
        outside += [node.name for node in each.made.outside if node.users]  # others are checks
    return QuantizationReport(dict(int8), dict(float32), outside)
