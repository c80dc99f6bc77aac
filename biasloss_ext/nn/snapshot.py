"""Modules as they were when something was derived from them, and whether they still are: in a few microseconds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """The classes of modules, their attributes, inner modules and buffers, and their parameters.

    It keeps modules and tensors alive, so that no other object takes the identity of one.

    Args:
        modules: what something was derived from.
        watched: those whose hooks count; all by default.
        keeps_parameters: whether a parameter that was exchanged for another one is a change. If not, its type alone counts,
            and whoever uses the snapshot reads parameters in each call.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        watched: Iterable[nn.Module] | None = None,
        *,
        keeps_parameters: bool = False,
    ) -> None:
        self.modules = [*dict.fromkeys(modules)]
        self._attributes = [module.__dict__ for module in self.modules]
        # A dictionary that takes the place of one of these differs from it, or is as empty.
        self._hooks = [getattr(m, name) for m in (self.modules if watched is None else watched) for name in HOOKS]
        self._inner, self._buffers, self._parameters = (
            [getattr(module, name) for module in self.modules if getattr(module, name)]
            for name in ("_modules", "_buffers", "_parameters")
        )
        self._of_parameter: Any = id if keeps_parameters else type
        self._kept_alive = [*_flat(self._buffers), *(_flat(self._parameters) if keeps_parameters else ())]
        self._values, self._state = _flat(self._attributes), self._read()

    def _read(self) -> tuple[list[Any], ...]:
        """Read what the attributes do not show: a dictionary that is the same object may have another content."""
        return (
            [*map(type, self.modules)],
            _flat(self._inner),
            [*map(id, _flat(self._buffers))],  # tensors are not compared by ==
            [*map(self._of_parameter, _flat(self._parameters))],
        )

    def is_hooked(self) -> bool:
        """Whether something waits for the calls of modules."""
        return any(self._hooks)

    def holds(self) -> bool:
        """Whether the modules are what they were, hooks aside."""
        try:
            return _flat(self._attributes) == self._values and self._read() == self._state
        except Exception:  # values that cannot be compared, as tensors of several elements, are others
            return False


def _flat(dictionaries: Iterable[Any]) -> list[Any]:
    # Not dict.values: those of a scripted module are no dictionaries.
    return [*chain.from_iterable([dictionary.values() for dictionary in dictionaries])]
