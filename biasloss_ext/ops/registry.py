"""An op is one declaration that owns its backends.

`Op` defines the schema, the shape function and the implementations of an op, and enters it in `OPS`. The choice of backends,
``biasloss info``, the benchmarks and the tests are generated from `OPS`, so that no op can be forgotten.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biasloss_ext.ops import backends
from biasloss_ext.ops.library import LIBRARY, define
from biasloss_ext.ops.maps import LAST_ACTIVATION, checked_activation
from biasloss_ext.ops.replay import recording

OPS: dict[str, Op] = {}


class Op:
    """``biasloss_ext::name`` for the compiled kernels, ``biasloss_ext::name_triton`` for Triton's, and the reference.

    Args:
        reference: the implementation in plain PyTorch, with the name of the op and the parameters of the schema.
        signature: schema without the name.
        fake: the shape function.
        native: the compiled backends, from "cpu" and "cuda".
        triton: whether the module ``triton`` next to the reference has a function of the same name and parameters; the first
            call imports it.
        autograd: makes the implementation for the Autograd key of an overload of the op; None for an op that the layers
            differentiate.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        signature: str,
        fake: Callable[..., Any],
        *,
        native: tuple[str, ...],
        triton: bool,
        autograd: Callable[[torch._ops.OpOverload], Callable[..., Any]] | None = None,
    ) -> None:
        self.name = name = reference.__name__
        self.package = reference.__module__.rpartition(".")[0]
        self.family = self.package.rpartition(".")[2]
        self.backends = ("reference", *native, *(("triton",) if triton else ()))
        self.fake = fake
        self.reference = reference
        self.native = define(name, signature, fake)
        self.triton = define(f"{name}_triton", signature, fake) if triton else None
        self._triton_function: Callable[..., Any] | None = None
        self._pure: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}
        self._activations = tuple(re.findall(r"int (\w*activation)", signature))
        self._updated = tuple(re.findall(r"Tensor\(\w!\)\? (\w+)", signature))
        if self.triton is not None:
            # On CPU tensors the kernels run only under Triton's interpreter.
            for key in ("CUDA", "CPU"):
                LIBRARY.impl(self.triton, self._dispatched_triton, key)
        if self._updated and signature.endswith("-> Tensor"):
            overloads = (of for of in (self.native, self.triton) if of is not None)
            self._pure = {of: _without_updates(of, signature, fake) for of in overloads}
        if autograd is not None:
            for overload in (self.native, self.triton):
                if overload is not None:
                    LIBRARY.impl(overload, autograd(overload), "Autograd")
        backends.BACKENDS_OF[name] = self.backends
        OPS[name] = self

    def __call__(self, *arguments: Any, backend: str = "auto", **options: Any) -> Any:
        """Run the op on the device of the first tensor.

        Raises:
            ValueError: an unknown activation or backend.
            RuntimeError: the named backend cannot run on this device; the message has the cause.
        """
        first = arguments[0]
        if not isinstance(first, Tensor):
            first = next(argument for argument in arguments if isinstance(argument, Tensor))
        chosen = backends.choose(backend, first.device, self.name)
        self._check_activations(options)
        if chosen == "reference":
            return self.reference(*arguments, **options)
        if chosen != "triton":
            return self._run_native(arguments, options)
        if is_traced(first):
            assert self.triton is not None
            return self._run_traced(self.triton, arguments, options)
        return self._run_triton(first, arguments, options)

    def _check_activations(self, options: dict[str, Any]) -> None:
        for name in self._activations:
            number = options.get(name, 0)
            if number.__class__ is not int or not 0 <= number <= LAST_ACTIVATION:
                options[name] = checked_activation(number, name)

    def _dispatched_triton(self, *arguments: Any, **options: Any) -> Any:
        """A call through ``torch.ops``, whose arguments are not checked yet."""
        self._check_activations(options)
        first = next(argument for argument in arguments if isinstance(argument, Tensor))
        return self._run_triton(first, arguments, options)

    def _run_traced(self, overload: torch._ops.OpOverload, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The call that a compiler sees.

        If an op returns one tensor and may update arguments, but none of these is given, Inductor takes the first row of the
        result for the result (torch 2.13 and 2.14): such a call is one of an overload without these arguments.
        """
        pure = self._pure.get(overload)
        if pure is None or any(options.get(name) is not None for name in self._updated):
            return overload(*arguments, **options)
        return pure(*arguments, **{name: value for name, value in options.items() if name not in self._updated})

    def _run_native(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._pure and torch.compiler.is_compiling():
            return self._run_traced(self.native, arguments, options)
        results = self.native(*arguments, **options)
        recorder = recording.recorder
        if recorder is not None:
            recorder.called(self.native, arguments, options, results)
        return results

    def _run_triton(self, first: Tensor, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run on the device of ``first``, since Triton launches on the current device."""
        function = self._triton_function or self._import_triton()
        if first.is_cuda and first.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device_of(first):
                return function(*arguments, **options)
        return function(*arguments, **options)

    def _import_triton(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(f"{self.package}.triton"), self.name)
        self._triton_function = function
        return function


def declare(
    reference: Callable[..., Any],
    signature: str,
    *,
    native: tuple[str, ...] = ("cpu",),
    triton: bool = False,
    autograd: Callable[[torch._ops.OpOverload], Callable[..., Any]] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Decorator that makes the shape function of an op the `Op`, of which the arguments are."""
    return lambda fake: Op(reference, signature, fake, native=native, triton=triton, autograd=autograd)


def _without_updates(
    overload: torch._ops.OpOverload, signature: str, fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """A second overload of an op that cannot update its arguments; it lacks these."""
    name = overload._schema.name.removeprefix("biasloss_ext::")
    pure = define(f"{name}.pure", re.sub(r"Tensor\(\w!\)\? \w+=None, ", "", signature), fake)
    LIBRARY.impl(pure, lambda *arguments, **options: overload(*arguments, **options), "CompositeExplicitAutograd")
    return pure


def is_traced(x: Tensor) -> bool:
    """Whether a call must go through the dispatcher: it is compiled, or a mode or subclass intercepts tensors."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def families() -> dict[str, list[Op]]:
    """The ops by the folder that declares them. Ops of a family with other backends than the first have their own key."""
    found: dict[str, list[Op]] = {}
    for op in OPS.values():
        peers = found.setdefault(op.family, [])
        if peers and peers[0].backends != op.backends:
            found[op.name] = [op]
        else:
            peers.append(op)
    return found
