"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


def register(builder: Builder) -> Builder:
    """Decorator: makes a builder known to `create_model` under its own name."""
    _builders[builder.__name__] = builder
    return builder


def list_models() -> list[str]:
    """The names that `create_model` takes, in the order of registration."""
    return list(_builders)


def create_model(name: str, **options: Any) -> nn.Module:
    """Builds the model `name` with its builder's `options`.

    Raises:
        ValueError: no model of that name; the message lists them all.
    """
    if name not in _builders:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(list_models())}")
    return _builders[name](**options)
