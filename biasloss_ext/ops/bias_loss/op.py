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
# The op, its arguments before ``output`` and after it, and how many outputs are wanted.
Call = tuple["BiasLossOp", tuple[Any, ...], tuple[Any, ...], int]


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
    """Gradients flow to ``output`` alone; everything else comes in one tuple, which autograd need not look through."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: Call) -> tuple[Tensor, ...]:
        pair, before, after, wanted = call
        with torch._C._AutoDispatchBelowAutograd():
            outputs: Outputs = pair.op(*before, output, *after)
        _, weight, row_max, row_log_sum, denominator = outputs
        target, class_weight, *_, reduction, ignore_index, label_smoothing = after
        ctx.save_for_backward(output, target)
        # What no one else can change needs no watch over its version.
        ctx.kept = class_weight, weight, row_max, row_log_sum, denominator, reduction, ignore_index, label_smoothing
        ctx.backward_op = pair.backward_op
        if wanted > 1:
            ctx.mark_non_differentiable(*outputs[1:wanted])
        ctx.set_materialize_grads(False)
        return outputs[:wanted]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        gradient = None
        if grad_loss is not None:
            arguments = (grad_loss, *ctx.saved_tensors, *ctx.kept)
            if torch.is_grad_enabled():  # create_graph=True
                gradient = ctx.backward_op(*arguments)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    gradient = ctx.backward_op(*arguments)
        return gradient, None


class BiasLossOp:
    """The op of one kind of kernels and its backward."""

    def __init__(self, suffix: str) -> None:
        self.op = define(f"bias_loss{suffix}", SIGNATURE, _fake)
        self.backward_op = define(f"bias_loss_backward{suffix}", BACKWARD_SIGNATURE, _fake_backward)
        LIBRARY.impl(self.op, self._autograd, "Autograd")
        LIBRARY.impl(self.backward_op, self._autograd_of_backward, "Autograd")

    def __call__(
        self, output: Tensor, before: tuple[Any, ...], after: tuple[Any, ...], wanted: int
    ) -> tuple[Tensor, ...]:
        """The first ``wanted`` outputs of the op, given the arguments before ``output`` and after it.

        Eager mode takes a short cut past the dispatcher.
        """
        if torch.compiler.is_compiling():
            outputs: Outputs = self.op(*before, output, *after)
            return outputs[:wanted]
        return self._apply(output, before, after, wanted)

    def _apply(
        self, output: Tensor, before: tuple[Any, ...], after: tuple[Any, ...], wanted: int
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _BiasLoss.apply(output, (self, before, after, wanted))
        return outputs

    def _autograd(self, *arguments: Any) -> tuple[Tensor, ...]:
        return self._apply(arguments[3], arguments[:3], arguments[4:], 5)

    def _autograd_of_backward(self, *arguments: Any) -> Tensor:
        gradient: Tensor = _NoSecondDerivative.apply(self.backward_op, *arguments)
        return gradient


native = BiasLossOp("")
triton = BiasLossOp("_triton")
