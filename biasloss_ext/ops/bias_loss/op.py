"""``biasloss_ext::bias_loss`` and its backward: declarations and autograd.

The op writes ``running_min``, and ``torch.library.register_autograd`` does not accept ops that write. The autograd function is
therefore registered under the Autograd key directly. ``torch.compile`` and ``torch.export`` see one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biasloss_ext import checks
from biasloss_ext.ops.bias_loss import reference
from biasloss_ext.ops.bias_loss.reference import NONE
from biasloss_ext.ops.library import accumulation_dtype
from biasloss_ext.ops.registry import Op

SIGNATURE = (
    "(Tensor? features, Tensor? variance, Tensor? extrema, Tensor output, Tensor target, Tensor? class_weight, "
    "Tensor(a!)? running_min, float alpha, float beta, bool update_running_min, int reduction, int ignore_index, "
    "float label_smoothing) -> (Tensor loss, Tensor weight, Tensor statistics)"
)
BACKWARD_SIGNATURE = (
    "(Tensor grad_loss, Tensor output, Tensor target, Tensor? class_weight, Tensor weight, "
    "Tensor statistics, int reduction, int ignore_index, float label_smoothing) -> Tensor"
)

# The statistics that the backward pass needs: the denominator of the mean, then the maximum of each row of scores, then
# each row's log of the sum of exp(score - maximum).
Outputs = tuple[Tensor, Tensor, Tensor]
# The kernels; features, variance and extrema; the arguments after ``output``; the number of outputs to return.
Call = tuple["BiasLossKernels", tuple[Any, ...], tuple[Any, ...], int]

# Names of their own: a training step looks them up with cold caches.
_below_autograd = torch._C._AutoDispatchBelowAutograd
transforms_are_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def _shapes(*arguments: Any, **options: Any) -> Outputs:
    call = reference.Arguments(*arguments, **options)
    output = call.output
    checks.tensors(call.features, call.variance, output, call.target, call.class_weight)
    dtype = accumulation_dtype(output.dtype)
    positions = (output.shape[0], *output.shape[2:])
    rows = positions[0] if len(positions) == 1 else positions[0] * positions[1]

    def empty(*shape: int) -> Tensor:
        return output.new_empty(shape, dtype=dtype)

    loss = empty(*positions) if call.reduction == NONE else empty()
    return loss, empty(positions[0]), empty(1 + 2 * rows)


def _shape_of_gradient(grad_loss: Tensor, output: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(output)


class _NoSecondDerivative(torch.autograd.Function):
    """Runs the backward op. Differentiating it again raises an error with advice."""

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
        # What no one else can change needs no watch over its version; what the caller gets to hold does.
        others = (weight, statistics)[: wanted - 1]
        ctx.save_for_backward(output, target, class_weight, *others)
        ctx.kept = pair, (weight, statistics)[wanted - 1 :], after[-3:]
        if wanted == 1:
            return loss
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return loss, *others

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("the fused Bias Loss has no forward-mode derivative; backend='reference' has")

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        if grad_loss is None:
            return None, None
        pair, unseen, options = ctx.kept
        arguments = grad_loss, *ctx.saved_tensors, *unseen, *options
        # create_graph=True, or compiled autograd, which sees the op
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return pair.backward_op(*arguments), None
        with _below_autograd():
            return pair.run_backward(*arguments), None


# torch.autograd.Function.apply without its search for tensors of ended torch.func transforms: 3% of a step of a small batch.
_apply = super(torch.autograd.Function, _BiasLoss).apply


class BiasLossKernels:
    """The overloads of the op and of its backward for one kind of kernels, put together by autograd."""

    def __init__(self, op: torch._ops.OpOverload, backward_op: torch._ops.OpOverload) -> None:
        self.op = op
        self.backward_op = backward_op
        # The part of an overload that calling it calls.
        self.run = op._op
        self.run_backward = backward_op._op

    def __call__(
        self, output: Tensor, before: tuple[Any, ...], after: tuple[Any, ...], wanted: int
    ) -> tuple[Tensor, ...]:
        """The first ``wanted`` outputs of the op, given the arguments before ``output`` and after it.

        Eager mode takes a short cut past the dispatcher.
        """
        if torch.compiler.is_compiling() or _tracing_state() is not None:
            outputs: Outputs = self.op(*before, output, *after)
            return outputs[:wanted]
        results: Any = _apply(output, (self, before, after, wanted))
        return (results,) if wanted == 1 else results


def _autograd(overload: torch._ops.OpOverload) -> Callable[..., Outputs]:
    """Looks its kernels up by call: they are put together after both ops are declared."""

    def run(*arguments: Any) -> Outputs:
        kernels = triton if overload is forward.triton else native
        outputs: Outputs = _BiasLoss.apply(arguments[3], (kernels, arguments[:3], arguments[4:], 3))
        return outputs

    return run


def _autograd_of_backward(overload: torch._ops.OpOverload) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        gradient: Tensor = _NoSecondDerivative.apply(overload, *arguments)
        return gradient

    return run


_backends: dict[str, Any] = {"native": ("cpu", "cuda"), "triton": True}
forward = Op(reference.bias_loss, SIGNATURE, _shapes, **_backends, autograd=_autograd)
backward = Op(
    reference.bias_loss_backward, BACKWARD_SIGNATURE, _shape_of_gradient, **_backends, autograd=_autograd_of_backward
)
assert forward.triton is not None and backward.triton is not None
native = BiasLossKernels(forward.native, backward.native)
triton = BiasLossKernels(forward.triton, backward.triton)
