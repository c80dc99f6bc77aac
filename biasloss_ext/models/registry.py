"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


def register(builder: Builder) -> Builder:
    """Decorator that makes a builder known to `create_model` under its own name."""
    _builders[builder.__name__] = builder
    return builder


def list_models() -> list[str]:
    """The names that `create_model` accepts, in the order of registration."""
    return list(_builders)


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: one of `list_models`.
        options: arguments of its builder.

    Raises:
        ValueError: unknown name; the message lists all names.
    """
    if name not in _builders:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(list_models())}")
    return _builders[name](**options)
