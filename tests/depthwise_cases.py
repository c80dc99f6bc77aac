"""What the tests of depthwise and expand_depthwise share: drawn maps, and how large an error may be.

Maps, weights of expansions and affine rows are small multiples of powers of two, so that what an activation is given is
exact in every dtype: at a kink, a rounding would change a derivative by as much as its size.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.library import accumulation_dtype
from tests import oracle
from tests.calls import Call
from tests.runnable import backends_of

BACKENDS = backends_of("depthwise")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Below, at and above a vector of every instruction set, with and without a rest.
CHANNELS = (1, 3, 8, 16, 17, 24, 33, 40, 72, 100)
SIZES = (1, 2, 3, 4, 7, 8, 9, 15, 16)


class Source:
    """Random tensors of one drawn seed and dtype."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw(st.sampled_from(FLOATS))
        self.wide = accumulation_dtype(self.dtype)

    def map(self, *shape: int, mean: float = 0.0) -> Tensor:
        values = torch.randint(-24, 25, shape, generator=self.generator) / 8 + mean
        return maps.channels_last(values.to(self.dtype))

    def gradient(self, *shape: int) -> Tensor:
        return maps.channels_last(torch.randn(shape, generator=self.generator).to(self.dtype))

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.wide)

    def exact(self, *shape: int) -> Tensor:
        return (torch.randint(-4, 5, shape, generator=self.generator) / 4).to(self.wide)

    def moments(self, channels: int) -> Tensor:
        return torch.stack((self.values(channels), self.values(channels).square() + 0.5))

    def affine(self, channels: int) -> Tensor:
        scale = 2.0 ** torch.randint(-1, 2, (channels,), generator=self.generator)
        sign = torch.randint(0, 2, (channels,), generator=self.generator) * 2 - 1
        shift = torch.randint(-32, 33, (channels,), generator=self.generator) / 16
        return torch.stack((scale * sign, shift)).to(self.wide)


def compare(
    names: Sequence[str],
    ours: Sequence[Tensor],
    reference: Callable[..., Any],
    call: Call,
    moments: int | None = None,
) -> None:
    """Every output against the reference in float64, coefficients row by row; allowed is twice the error of the reference
    in its own dtype and a few roundings of the sums of magnitudes that the outputs are made of.

    Args:
        names: of the outputs; what comes after the last name is left out.
        moments: their position among the arguments, where they are no option.
    """
    runs = (call.to(torch.float64), call, call.magnitudes(moments))
    outputs = [list(ours[: len(names)]), *(list(run.fresh()(reference))[: len(names)] for run in runs)]
    names = list(names)
    if names[-1] == "coefficients" and outputs[0][-1].numel() > 0:
        names[-1:] = [f"coefficients[{row}]" for row in range(6)]
        for found in outputs:
            found[-1:] = found[-1].unbind()
    for name, mine, exact, rough, scale in zip(names, *outputs, strict=True):
        assert mine.dtype == rough.dtype, name
        assert mine.shape == rough.shape, name
        if mine.dim() == 4:
            assert mine.is_contiguous(memory_format=torch.channels_last) or name.startswith("grad_"), name
        largest = scale.abs().max().item() if scale.numel() > 0 else 0.0
        narrowest = torch.finfo(torch.float64 if mine.dtype == torch.float64 else torch.float32).eps
        roundings = largest * (narrowest / torch.finfo(mine.dtype).eps) * (16 if narrowest < 1e-10 else 4)
        oracle.assert_as_close_as_torch(mine, exact, rough, roundings, name)


def assert_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def with_threads(count: int, run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def outputs_with(instruction_set: str, code: str, folder: Any) -> list[Tensor]:
    """The list ``outputs`` that ``code`` leaves, computed in a process held to an instruction set."""
    path = folder / f"{instruction_set}.pt"
    environment = {**os.environ, "BIASLOSS_CPU_ISA": instruction_set, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"import torch\n{code}\ntorch.save(outputs, {str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    outputs: list[Tensor] = torch.load(path)
    return outputs
