"""Programs in plain PyTorch: instruction by instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from biasloss_ext.ops import maps
from biasloss_ext.ops.program import quantized
from biasloss_ext.ops.program.code import Instruction, Operation, instructions
from biasloss_ext.ops.program.vectors import by_outputs
from biasloss_ext.ops.registry import OPS


def program(x: Tensor, constants: list[Tensor], code: list[int]) -> Tensor:
    """``biasloss_ext::program``"""
    return interpret(x, constants, code, lambda name: OPS[name].reference)


def interpret(x: Tensor, constants: list[Tensor], code: list[int], form_of: Callable[[str], Any]) -> Tensor:
    """The result, by the form of each op that ``form_of`` gives for its name."""
    values: dict[int, Tensor] = {0: x}
    last = 0
    for row in instructions(code):
        if row.operation == Operation.RELEASE:
            del values[row.input]
            continue
        last = row.output
        result = _run(row, values, constants, form_of)
        values[last] = result[0] if isinstance(result, tuple) else result
        if row.pooled >= 0:
            values[row.pooled] = result[1]
    return values[last]


def _run(i: Instruction, values: dict[int, Tensor], constants: list[Tensor], form_of: Callable[[str], Any]) -> Any:
    x, other, own = values[i.input], values.get(i.other), constants[i.constants :]
    geometry: dict[str, Any] = {"stride": i.stride, "same_padding": bool(i.same_padding)}
    match i.operation:
        case Operation.EXPAND_DEPTHWISE:
            of_y: dict[str, Any] = {"y_activation": i.output_activation, "want_pool": i.pooled >= 0}
            expand = by_outputs(own[0], own[2].shape[0])
            return form_of("expand_depthwise_activate")(
                x, expand, *own[1:4], activation=i.activation, **geometry, **of_y
            )
        case Operation.DEPTHWISE:
            affine = own[1] if i.on_load else None
            return form_of("depthwise")(x, own[0], affine=affine, activation=i.activation, **geometry)
        case Operation.POINTWISE:
            affine = own[2] if i.on_load else None
            on_load: dict[str, Any] = {"affine": affine, "activation": i.activation, "gate": values.get(i.gate)}
            after: dict[str, Any] = {"bias": own[1], "output_activation": i.output_activation, "residual": other}
            return form_of("pointwise")(x, by_outputs(own[0], own[1].shape[0]), **on_load, **after)
        case Operation.POOL:
            return form_of("pool_variance")(x, affine=own[0] if i.on_load else None, activation=i.activation)
        case Operation.SQUEEZE_EXCITE:
            activations: dict[str, Any] = {"activation": i.activation, "gate_activation": i.output_activation}
            return form_of("squeeze_excite")(x, *own[:4], **activations)
        case Operation.NORMALIZE:
            return form_of("batch_norm_apply")(x, own[0], activation=i.activation, residual=other)
        case Operation.CONVOLUTION:
            y = F.conv2d(x, own[0], own[1], i.stride, i.padding)
            return maps.channels_last(maps.activate(y, i.output_activation))
        case Operation.LINEAR:
            return maps.activate(F.linear(x, own[0], own[1]), i.output_activation)
        case Operation.AVERAGE:
            assert other is not None
            return maps.channels_last(F.adaptive_avg_pool2d(x, (other.shape[2], other.shape[3])))
    return quantized.run(i, x, other, values.get(i.gate), own)
