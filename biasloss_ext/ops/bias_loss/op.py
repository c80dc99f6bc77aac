"""``biasloss_ext::bias_loss`` and its backward: schemas, shape functions and autograd, for the compiled kernels and for
their Triton twin.

The op writes ``running_min``, and ``torch.library.register_autograd`` refuses ops that write: the autograd function is
registered under the Autograd key by hand. ``torch.compile`` and ``torch.export`` then see one op and never look inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops.bias_loss.reference import NONE
from biasloss_ext.ops.library import LIBRARY, accumulation_dtype, define

SIGNATURE = (
    "(Tensor? features, Tensor? variance, Tensor? extrema, Tensor output, Tensor target, Tensor? class_weight, "
    "Tensor(a!)? running_min, float alpha, float beta, bool update_running_min, int reduction, int ignore_index, "
    "float label_smoothing) -> (Tensor loss, Tensor weight, Tensor row_max, Tensor row_log_sum, Tensor denominator)"
)
BACKWARD_SIGNATURE = (
    "(Tensor grad_loss, Tensor output, Tensor target, Tensor? class_weight, Tensor weight, Tensor row_max, "
    "Tensor row_log_sum, Tensor denominator, int reduction, int ignore_index, float label_smoothing) -> Tensor"
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake(
    features: Tensor | None,
    variance: Tensor | None,
    extrema: Tensor | None,
    output: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    running_min: Tensor | None,
    alpha: float,
    beta: float,
    update_running_min: bool,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Outputs:
    dtype = accumulation_dtype(output.dtype)
    positions = (output.shape[0], *output.shape[2:])
    rows = positions[0] if len(positions) == 1 else positions[0] * positions[1]

    def empty(*shape: int) -> Tensor:
        return output.new_empty(shape, dtype=dtype)

    loss = empty(*positions) if reduction == NONE else empty()
    return loss, empty(positions[0]), empty(rows), empty(rows), empty()


def _fake_backward(grad_loss: Tensor, output: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(output)


class _NoSecondDerivative(torch.autograd.Function):
    """Runs the backward op; differentiating it again is an error that says what to do."""

    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            gradient: Tensor = op(*arguments)
        return gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "the fused Bias Loss has no second derivative; backend='reference' is differentiable any number of times"
        )


class _BiasLoss(torch.autograd.Function):
    """Gradients flow to ``output`` alone."""

    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, backward_op: torch._ops.OpOverload, *arguments: Any) -> Outputs:
        with torch._C._AutoDispatchBelowAutograd():
            outputs: Outputs = op(*arguments)
        _, weight, row_max, row_log_sum, denominator = outputs
        _, _, _, output, target, class_weight, *_, reduction, ignore_index, label_smoothing = arguments
        ctx.save_for_backward(output, target, class_weight, weight, row_max, row_log_sum, denominator)
        ctx.options = reduction, ignore_index, label_smoothing
        ctx.backward_op = backward_op
        ctx.mark_non_differentiable(weight, row_max, row_log_sum, denominator)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        gradient = None
        if grad_loss is not None:
            gradient = ctx.backward_op(grad_loss, *ctx.saved_tensors, *ctx.options)
        return (None,) * 5 + (gradient,) + (None,) * 9


def _define_pair(suffix: str) -> torch._ops.OpOverload:
    op = define(f"bias_loss{suffix}", SIGNATURE, _fake)
    backward_op = define(f"bias_loss_backward{suffix}", BACKWARD_SIGNATURE, _fake_backward)

    def autograd(*arguments: Any) -> Outputs:
        outputs: Outputs = _BiasLoss.apply(op, backward_op, *arguments)
        return outputs

    def autograd_of_backward(*arguments: Any) -> Tensor:
        gradient: Tensor = _NoSecondDerivative.apply(backward_op, *arguments)
        return gradient

    LIBRARY.impl(op, autograd, "Autograd")
    LIBRARY.impl(backward_op, autograd_of_backward, "Autograd")
    return op


native = _define_pair("")
triton = _define_pair("_triton")
