"""The torch library ``biasloss_ext``. Schemas are defined in Python, so that they exist without the compiled kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("biasloss_ext", "DEF")


def define(name: str, signature: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define ``biasloss_ext::name`` or ``biasloss_ext::name.overload`` with its shape function, and return its overload."""
    LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))

    @functools.wraps(fake)
    def on_one_device(*arguments: Any, **options: Any) -> Any:
        _check_devices(name, (*arguments, *options.values()))
        return fake(*arguments, **options)

    torch.library.register_fake(f"biasloss_ext::{name}", on_one_device, lib=LIBRARY)
    packet, _, kind = name.partition(".")
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops.biasloss_ext, packet), kind or "default")
    return overload


def with_arguments_of(structure: type[Any], **parts: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes a function of a NamedTuple one of its fields, as an op calls it: those with defaults by keyword.

    ``parts`` are fields of it that are NamedTuples themselves, in which all fields have defaults: an op calls it with these.
    """
    own = [field for field in inspect.signature(structure).parameters.values() if field.name not in parts]
    of_parts = [field for part in parts.values() for field in inspect.signature(part).parameters.values()]
    parameters = [
        field.replace(kind=field.KEYWORD_ONLY) if field.default is not field.empty else field
        for field in (*own, *of_parts)
    ]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            for name, part in parts.items():
                options[name] = part(**{field: options.pop(field) for field in part._fields if field in options})
            return function(structure(*arguments, **options))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _check_devices(name: str, arguments: tuple[Any, ...]) -> None:
    """Raise for tensors on several devices: a single meta tensor sends a call to the shape function, not to a kernel."""
    flat = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
    devices = dict.fromkeys(str(argument.device) for argument in flat if isinstance(argument, torch.Tensor))
    if len(devices) > 1:
        raise ValueError(
            f"biasloss_ext::{name} expects all tensors on one device, got {' and '.join(devices)}: move them to one device"
        )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for narrower dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32
