"""``biasloss_ext::bias_loss`` and its backward: schemas, shape functions and autograd, for the compiled kernels and for
their Triton twin.

The op writes ``running_min``, and ``torch.library.register_autograd`` refuses ops that write: the autograd function is
registered under the Autograd key by hand. ``torch.compile`` and ``torch.export`` then see one op and never look inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biasloss_ext import checks
from biasloss_ext.ops.bias_loss.reference import NONE
from biasloss_ext.ops.library import LIBRARY, accumulation_dtype, define

SIGNATURE = (
    "(Tensor? features, Tensor? variance, Tensor? extrema, Tensor output, Tensor target, Tensor? class_weight, "
    "Tensor(a!)? running_min, float alpha, float beta, bool update_running_min, int reduction, int ignore_index, "
    "float label_smoothing) -> (Tensor loss, Tensor weight, Tensor statistics)"
)
BACKWARD_SIGNATURE = (
    "(Tensor grad_loss, Tensor output, Tensor target, Tensor? class_weight, Tensor weight, "
    "Tensor statistics, int reduction, int ignore_index, float label_smoothing) -> Tensor"
)

# Statistics are what the backward pass needs of the forward pass: the denominator of the mean, then the maximum of every
# row of scores, then every row's log of the sum of exp(score - maximum).
Outputs = tuple[Tensor, Tensor, Tensor]
# The op; features, variance and extrema; everything behind ``output``; how many outputs are wanted.
Call = tuple["BiasLossOp", tuple[Any, ...], tuple[Any, ...], int]

# By name here, since a training step looks them up with cold caches.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_are_active = torch._C._are_functorch_transforms_active


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
    checks.tensors(features, variance, output, target, class_weight)
    dtype = accumulation_dtype(output.dtype)
    positions = (output.shape[0], *output.shape[2:])
    rows = positions[0] if len(positions) == 1 else positions[0] * positions[1]

    def empty(*shape: int) -> Tensor:
        return output.new_empty(shape, dtype=dtype)

    loss = empty(*positions) if reduction == NONE else empty()
    return loss, empty(positions[0]), empty(1 + 2 * rows)


def _fake_backward(grad_loss: Tensor, output: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(output)


class _NoSecondDerivative(torch.autograd.Function):
    """Runs the backward op; differentiating it again is an error that says what to do."""

    @staticmethod
    def forward(ctx: Any, op: torch._ops.OpOverload, *arguments: Any) -> Tensor:
        with _below_autograd():
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
    def forward(ctx: Any, output: Tensor, call: Call) -> Any:
        pair, before, after, wanted = call
        with _below_autograd():
            loss, weight, statistics = pair.run(*before, output, *after)
        target, class_weight = after[:2]
        ctx.save_for_backward(output, target)
        # What no one else can change needs no watch over its version.
        ctx.kept = pair, class_weight, weight, statistics, after[-3:]
        if wanted == 1:
            return loss
        others = (weight, statistics)[: wanted - 1]
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        if grad_loss is None:
            return None, None
        pair, class_weight, weight, statistics, options = ctx.kept
        arguments = grad_loss, *ctx.saved_tensors, class_weight, weight, statistics, *options
        # create_graph=True, or compiled autograd, which sees the op
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return pair.backward_op(*arguments), None
        with _below_autograd():
            return pair.run_backward(*arguments), None


# torch.autograd.Function.apply without its search for tensors of ended torch.func transforms: 3% of a step of a small batch.
_apply = super(torch.autograd.Function, _BiasLoss).apply


class BiasLossOp:
    """The op of one kind of kernels and its backward."""

    def __init__(self, suffix: str) -> None:
        self.op = define(f"bias_loss{suffix}", SIGNATURE, _fake)
        self.backward_op = define(f"bias_loss_backward{suffix}", BACKWARD_SIGNATURE, _fake_backward)
        # What calling an op calls.
        self.run = self.op._op
        self.run_backward = self.backward_op._op
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
        # Under a transform of torch.func its own message says what is missing.
        apply = _BiasLoss.apply if _transforms_are_active() else _apply
        results: Any = apply(output, (self, before, after, wanted))
        return (results,) if wanted == 1 else results

    def _autograd(self, *arguments: Any) -> Outputs:
        outputs: Outputs = _BiasLoss.apply(arguments[3], (self, arguments[:3], arguments[4:], 3))
        return outputs

    def _autograd_of_backward(self, *arguments: Any) -> Tensor:
        gradient: Tensor = _NoSecondDerivative.apply(self.backward_op, *arguments)
        return gradient


native = BiasLossOp("")
triton = BiasLossOp("_triton")
