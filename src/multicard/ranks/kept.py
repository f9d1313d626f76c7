"""Values that stay on their ranks, and the handle that represents them in calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """A value that every rank of a :class:`multicard.Ranks` keeps; as an argument it becomes each rank's own value."""

    key: int


class Shelf(dict[int, Any]):
    """One rank's kept values, by key."""

    def fill(self, key: int, generator: Generator[Any, None, Any]) -> Iterator[Any]:
        """Yield the items of ``generator``, and keep its return value."""
        self[key] = yield from generator

    def resolve(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with every Kept replaced by this rank's value."""

        def own(value: Any) -> Any:
            return self[value.key] if isinstance(value, Kept) else value

        return [own(value) for value in args], {name: own(value) for name, value in kwargs.items()}
