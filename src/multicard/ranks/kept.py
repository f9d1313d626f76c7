"""Values that stay on their ranks, and the handle that represents them in calls."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """A value that every rank of a :class:`multicard.Ranks` keeps; as an argument it becomes each rank's own value."""

    key: int


class Shelf(dict[int, Any]):
    """What one rank keeps, by key; functions that are called from here find it, and the rank's ``mesh``."""

    mesh: Any = None

    def call(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """``fn(mesh, ...)`` with every Kept replaced by what it stands for here."""

        def own(value: Any) -> Any:
            return self[value.key] if isinstance(value, Kept) else value

        return fn(self.mesh, *map(own, args), **{name: own(value) for name, value in kwargs.items()})

    def keep(self, key: int, *call: Any) -> Iterator[Any]:
        """Keep what ``fn(mesh, ...)`` returns, and pass on what it yields before that if it is a generator function."""
        value = self.call(*call)
        self[key] = (yield from value) if isinstance(value, types.GeneratorType) else value
