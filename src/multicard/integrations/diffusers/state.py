"""State of modules and their attention processors besides parameters: attention maps, counters, feature stores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None))
DEPTH = 4
"""How deep nested objects are searched: a processor, its store, the store's lists, their items."""


class ModuleState:
    """A snapshot; two are equal if nothing was assigned, appended or written in place between them.

    Private attributes are left out: hooks (offloading) and compilation keep their own state there.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept: list[Any] = []  # objects are compared by id, so they must stay alive, or an id could be reused
        self._seen: set[int] = set()
        self._facts = list(itertools.chain.from_iterable(self._attributes(module, DEPTH) for module in modules))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModuleState) and self._facts == other._facts

    __hash__ = None  # type: ignore[assignment]

    def _attributes(self, owner: Any, depth: int) -> Iterator[Any]:
        for name, value in list(vars(owner).items()):
            if not name.startswith("_"):
                yield name
                yield from self._describe(value, depth)

    def _describe(self, value: Any, depth: int) -> Iterator[Any]:
        if isinstance(value, PLAIN):
            yield value
            return
        self._kept.append(value)
        yield id(value)
        if isinstance(value, Tensor):
            yield 0 if value.is_inference() else value._version
        elif isinstance(value, (nn.Module, type)) or callable(getattr(value, "__get__", None)):
            return  # modules are searched separately; classes and functions keep no state
        elif depth and id(value) not in self._seen:
            self._seen.add(id(value))
            yield from self._inside(value, depth - 1)

    def _inside(self, value: Any, depth: int) -> Iterator[Any]:
        if isinstance(value, Mapping):
            for key, item in list(value.items()):
                yield key
                yield from self._describe(item, depth)
        elif isinstance(value, (list, tuple, set, frozenset)):
            yield len(value)
            for item in list(value):
                yield from self._describe(item, depth)
        elif hasattr(value, "__dict__"):
            yield from self._attributes(value, depth)
