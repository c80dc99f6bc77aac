"""The arguments of an op, as one value that tests draw, change and hand to every implementation of the op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# What an op writes.
WRITTEN = ("running_mean", "running_var", "num_batches_tracked", "running_min")


@dataclass(frozen=True)
class Call:
    """``call(op)`` runs an op, or anything with its parameters."""

    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, function: Callable[..., Any], **options: Any) -> Any:
        return function(*self.arguments, **self.options, **options)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """With every tensor changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, list):
                return [changed(element) for element in value]
            return change(value) if isinstance(value, Tensor) else value

        return Call(
            tuple(changed(value) for value in self.arguments),
            {name: changed(value) for name, value in self.options.items()},
        )

    def to(self, dtype: torch.dtype) -> Call:
        """With every floating-point tensor in ``dtype``."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def magnitudes(self, moments: int | None = None) -> Call:
        """In float64 and positive, but for means, which turn negative: no difference from one cancels.

        Args:
            moments: the position of the moments, where they are no option.
        """
        found = self.map(lambda t: t.double().abs() if t.is_floating_point() else t)
        centers = [(found.options.get(name), row) for name, row in (("moments", 0), ("y_coefficients", 3))]
        if moments is not None:
            centers.append((found.arguments[moments], 0))
        for values, row in centers:
            if isinstance(values, Tensor):
                values[row].neg_()
        return found

    def fresh(self) -> Call:
        """With copies of what the op writes."""
        copies = {name: t.clone() for name, t in self.options.items() if name in WRITTEN and isinstance(t, Tensor)}
        return self.but(**copies)

    def but(self, at: dict[int, Any] | None = None, **options: Any) -> Call:
        """With other arguments at some positions, and other options."""
        arguments = tuple((at or {}).get(position, value) for position, value in enumerate(self.arguments))
        return Call(arguments, {**self.options, **options})


def in_a_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
