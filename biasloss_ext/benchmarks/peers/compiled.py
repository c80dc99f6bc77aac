"""The same under ``torch.compile``."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MODES = {"torch.compile": "default", "torch.compile max-autotune": "max-autotune"}

_numbers = itertools.count()


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """``function`` compiled as by a user who has one shape.

    Dynamo remembers by file, line and name of a function which of its sizes have changed, and compiles for any size from
    then on. Names of their own keep the workloads apart.
    """
    if isinstance(function, nn.Module):
        forward = _renamed(type(function).forward)
        function.__class__ = type(forward.__name__, (type(function),), {"forward": forward})

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    return torch.compile(_renamed(call), mode=mode)


def _renamed(function: Any) -> types.FunctionType:
    name = f"{function.__name__}_{next(_numbers)}"
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
