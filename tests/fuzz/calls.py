"""A call of an op with drawn arguments: mostly near what the op expects, with one or two arguments that are not."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops.maps import LAST_ACTIVATION
from biasloss_ext.ops.registry import OPS
from tests.fuzz.memory import GuardedMemory
from tests.fuzz.shapes import INTEGERS, SHAPES, STORED

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ANY_DTYPE = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16, torch.bool, torch.complex64)
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40)
NUMBERS = (0.0, 0.1, 0.3, 1.0, -1.0, 1e-5, 1e30, math.nan, math.inf, -math.inf)
INTEGER_VALUES = (0, 1, 2, 3, 4, 5, 6, 7, -1, -100, 99, 255, 2**31, -(2**31), 2**62, -(2**63))
_POOL = 4096


@dataclass
class Call:
    op: str
    arguments: dict[str, Any]
    mutable: set[str]

    def __str__(self) -> str:
        return f"{self.op}({', '.join(f'{name}={describe(value)}' for name, value in self.arguments.items())})"


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    shape = ", ".join(map(str, value.shape))
    return f"{str(value.dtype).removeprefix('torch.')}[{shape}]/{tuple(value.stride())}@{value.device.type}"


class Values:
    """Numbers to fill tensors with, made once."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(_POOL, generator=generator, dtype=torch.float64)
        special = normal.clone()
        special[::5], special[1::7], special[2::11], special[3::13] = math.nan, math.inf, -math.inf, 1e38
        small = torch.randint(0, 4, (_POOL,), generator=generator)
        wild = small.clone()
        wild[::6], wild[1::7], wild[2::17], wild[3::19] = -100, 10**6, 2**62, -5
        self._of = {
            dtype: [(normal if dtype.is_floating_point or dtype.is_complex else small).to(dtype)] * 3
            + [
                (special if dtype.is_floating_point or dtype.is_complex else wild).to(dtype),
                torch.zeros(_POOL, dtype=dtype),
            ]
            for dtype in ANY_DTYPE
        }

    def fill(self, tensor: Tensor, draw: random.Random) -> None:
        if 0 < tensor.numel() <= _POOL:
            tensor.copy_(draw.choice(self._of[tensor.dtype])[: tensor.numel()].view(tensor.shape))
        elif tensor.numel():
            tensor.fill_(1)


class Drawing:
    """Draws calls; the number of a call decides all of it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._memory = GuardedMemory()
        self._values = Values()
        # A program runs the other ops by instructions, which no drawing of tensors makes sense of.
        self._names = sorted(name for name, op in OPS.items() if "cpu" in op.backends and name != "program")
        missing = [name for name in self._names if name not in SHAPES]
        if missing:
            raise NotImplementedError(f"no shapes for {', '.join(missing)}: add them to tests/fuzz/shapes.py")

    def call(self, number: int) -> Call:
        draw = random.Random(self._seed * 1_000_003 + number)
        op = OPS[draw.choice(self._names)]
        sizes = self._sizes(draw)
        dtype = draw.choice(FLOATS)
        nonsense = draw.random() < 0.05
        arguments: dict[str, Any] = {}
        mutable = set()
        for argument in op.native._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                mutable.add(argument.name)
            arguments[argument.name] = self._argument(draw, op.name, argument, sizes, dtype, nonsense)
        call = Call(op.name, arguments, mutable)
        for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
            self._spoil(draw, call, op)
        return call

    def _sizes(self, draw: random.Random) -> dict[str, int]:
        some = SIZES[1:] if draw.random() < 0.9 else SIZES
        sizes = {name: draw.choice(some) for name in "CKER"}
        sizes.update({name: draw.choice((1, 1, 2, 3, 4, 7, 12) if draw.random() < 0.95 else (0,)) for name in "NHWS"})
        sizes["k"], sizes["stride"] = draw.choice((3, 5, 7)), draw.choice((1, 2))
        sizes["h"], sizes["w"] = -(-sizes["H"] // sizes["stride"]), -(-sizes["W"] // sizes["stride"])
        sizes["scores"] = draw.choice((2, 3))
        if sizes["scores"] == 2:
            sizes["S"] = 1
        sizes["L"] = 1 + 2 * sizes["N"] * sizes["S"]
        return sizes

    def _argument(
        self, draw: random.Random, op: str, argument: Any, sizes: dict[str, int], dtype: torch.dtype, nonsense: bool
    ) -> Any:
        kind, name = str(argument.type), argument.name
        if "Tensor" in kind:
            if kind.startswith("Optional") and draw.random() < 0.35:
                return None
            return self._nonsense(draw) if nonsense else self._tensor(draw, op, name, sizes, dtype)
        if kind == "bool":
            return draw.random() < 0.5
        if kind == "float":
            return draw.choice(NUMBERS[:3] if draw.random() < 0.9 else NUMBERS)
        if name == "stride":
            return sizes["stride"]
        if name == "ignore_index":
            return draw.choice((-100, 0, 1, *INTEGER_VALUES))
        if name in ("count", "positions"):
            return draw.choice((1, 2, 12, sizes["H"] * sizes["W"]))
        return draw.choice((0, 1, 2) if name == "reduction" else range(LAST_ACTIVATION + 1))

    def _tensor(self, draw: random.Random, op: str, name: str, sizes: dict[str, int], dtype: torch.dtype) -> Tensor:
        words = SHAPES[op][name].split()
        is_map = words[:1] == ["map"]
        shape = tuple(sizes[word] if word in sizes else int(word) for word in words[is_map:])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if SHAPES[op] is SHAPES["bias_loss"]:
            if sizes["scores"] == 2 and name in ("output", "target", "grad_loss"):
                shape = shape[:-1]
            if name == "grad_loss" and draw.random() < 0.5:
                shape = ()
            if name == "target" and draw.random() < 0.3:
                scores = (sizes["N"], sizes["K"], sizes["S"])[: sizes["scores"]]
                return self._filled(draw, scores, draw.choice((dtype, wide)))
            if name == "target":
                return self._filled(draw, shape, draw.choice((torch.int64, torch.int32, torch.uint8)))
        own = dtype if name in STORED else torch.int64 if name in INTEGERS else wide
        if name == "running_min":
            own = torch.float32
        return self._filled(draw, shape, own, "channels_last" if is_map else "contiguous")

    def _filled(
        self, draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype, layout: str | None = None
    ) -> Tensor:
        layout = layout or draw.choice(("contiguous", "contiguous", "channels_last", "permuted", "gaps", "expanded"))
        order = list(range(len(shape)))
        if layout == "channels_last" and len(shape) > 1:
            order = [0, *order[2:], 1]
        elif layout == "permuted":
            draw.shuffle(order)
        stride, step = [0] * len(shape), draw.choice((2, 3)) if layout == "gaps" else 1
        for d in reversed(order):
            stride[d] = step
            step *= max(shape[d], 1)
        if layout == "expanded" and shape:
            stride[draw.randrange(len(shape))] = 0
        tensor = self._memory.tensor(shape, tuple(stride), dtype, draw)
        if layout != "expanded":
            self._values.fill(tensor, draw)
        elif tensor.numel():
            tensor[tuple(slice(None) if s else slice(1) for s in stride)].fill_(1)
        return tensor

    def _nonsense(self, draw: random.Random) -> Tensor:
        if draw.random() < 0.1:
            return torch.empty([draw.choice(SIZES) for _ in range(draw.randrange(5))], device="meta")
        if draw.random() < 0.02:
            return torch.empty((0, 2**30, 3)[: draw.randrange(1, 4)])
        shape = tuple(draw.choice(SIZES[:11]) for _ in range(draw.randrange(6)))
        while math.prod(shape) > _POOL:
            shape = shape[:-1]
        return self._filled(draw, shape, draw.choice(ANY_DTYPE))

    def _spoil(self, draw: random.Random, call: Call, op: Any) -> None:
        argument = draw.choice(op.native._schema.arguments)
        value, kind = call.arguments[argument.name], str(argument.type)
        if kind == "int":
            call.arguments[argument.name] = draw.choice(INTEGER_VALUES)
        elif kind == "float":
            call.arguments[argument.name] = draw.choice(NUMBERS)
        elif isinstance(value, Tensor) and value.device.type == "cpu" and draw.random() < 0.8:
            call.arguments[argument.name] = self._bent(draw, value)
        elif "Tensor" in kind:
            call.arguments[argument.name] = self._nonsense(draw)

    def _bent(self, draw: random.Random, value: Tensor) -> Tensor:
        """Nearly the tensor that was expected."""
        shape, way = list(value.shape), draw.randrange(6)
        if way == 0:
            return self._filled(draw, value.shape, draw.choice(ANY_DTYPE))
        if way == 1 and shape:
            shape[draw.randrange(len(shape))] = draw.choice(SIZES[:11])
        elif way == 2 and shape:
            shape.pop(draw.randrange(len(shape)))
        elif way == 3:
            shape.insert(draw.randrange(len(shape) + 1), draw.choice((0, 1, 2)))
        elif way == 4:
            return value.to("meta")
        if math.prod(shape) > _POOL:
            return value
        return self._filled(draw, tuple(shape), value.dtype)
