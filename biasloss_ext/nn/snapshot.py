"""Modules as they were when something was derived from them, and whether they still are: in a few microseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """The classes of modules, their attributes, inner modules and buffers, and the types of their parameters. A parameter may be
    exchanged for another one: whoever uses a snapshot reads parameters in each call.

    It keeps the modules alive, so that no other object takes the identity of one.

    Args:
        modules: none of which has hooks or a forward method of its own.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = [*dict.fromkeys(modules)]
        self.attributes = [module.__dict__ for module in self.modules]
        names = [name for attributes in self.attributes for name in attributes]
        self.values = _flat(self.attributes)
        self._hooks = itemgetter(*[index for index, name in enumerate(names) if name in HOOKS])
        self._inner, self._buffers, self._parameters = (
            self._filled(names, name) for name in ("_modules", "_buffers", "_parameters")
        )
        self.kept_alive = _flat(self._buffers(self.values))
        self.state = self._state(self.values)

    def _filled(self, names: list[str], wanted: str) -> Callable[[list[Any]], Sequence[Any]]:
        """What takes the dictionaries of that name that hold something."""
        found = [index for index, name in enumerate(names) if name == wanted and self.values[index]]
        return itemgetter(*found) if len(found) > 1 else lambda values: [values[index] for index in found]

    def _state(self, values: list[Any]) -> tuple[list[Any], ...]:
        """What is read from the attributes: dictionaries that are the same object may have other contents."""
        return (
            [*map(type, self.modules)],
            _flat(self._inner(values)),
            [*map(id, _flat(self._buffers(values)))],  # tensors are not compared by ==
            [*map(type, _flat(self._parameters(values)))],
        )

    def holds(self) -> bool:
        """Whether the modules are still as they were."""
        values = _flat(self.attributes)
        try:
            is_same = values == self.values
        except (RuntimeError, TypeError, ValueError):  # an attribute has become a tensor or an array
            return False
        return is_same and not any(self._hooks(values)) and self._state(values) == self.state


def _flat(dictionaries: Iterable[Any]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, dictionaries))]
