"""The interface to ranks that :class:`multicard.launch.Ranks` uses, whether this process started them or is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol


class Crew(Protocol):
    """The ranks of one job. Methods that run a function on them raise its error."""

    @property
    def alive(self) -> bool:
        """Whether they take further calls."""

    @property
    def told(self) -> bool:
        """Whether a call has raised because they ended, so that the caller knows."""

    @property
    def pids(self) -> list[int]:
        """Process ids by rank, of those that this process started."""

    def join(self) -> None:
        """Wait until all have started, then build their mesh; both within ``start_timeout`` in total."""

    def run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """``fn(mesh, ...)`` on every rank: values by rank."""

    def keep(self, key: int, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[float]:
        """The same, but each value stays on its rank until it is dropped. The iterator must be exhausted.

        If ``fn`` is a generator function, yields the items of rank 0; the kept value is its return value.
        """

    def drop(self, key: int) -> None:
        """Drop the kept value ``key``."""

    def stream(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """The items that rank 0's generator ``fn(mesh, ...)`` yields."""

    def end(self, why: str | BaseException, grace: float = 0.0) -> None:
        """End the ranks, by SIGKILL after ``grace`` seconds. Later calls raise an error that says ``why``."""
