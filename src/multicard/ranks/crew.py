"""What :class:`multicard.launch.Ranks` needs of ranks, whether this process started them or is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol


class Crew(Protocol):
    """The ranks of one job. What runs on them may raise, and so does everything that runs something."""

    @property
    def alive(self) -> bool:
        """Whether they take further calls."""

    @property
    def told(self) -> bool:
        """Whether a call has raised because they ended, so that a caller knows of it."""

    @property
    def pids(self) -> list[int]:
        """Process ids by rank, of those that this process started."""

    def join(self) -> None:
        """Wait until all have started, then build their mesh, within ``start_timeout`` in all."""

    def run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """``fn(mesh, ...)`` on every rank: values by rank."""

    def keep(self, key: int, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[float]:
        """The same, where the value stays on its rank until it is dropped. To be exhausted.

        Yields what rank 0's ``fn`` yields if it is a generator function, whose value is what it returns at last.
        """

    def drop(self, key: int) -> None:
        """Forget what is kept as ``key``."""

    def stream(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """What rank 0's generator ``fn(mesh, ...)`` yields."""

    def end(self, why: str | BaseException, grace: float = 0.0) -> None:
        """End them: after ``grace`` seconds by SIGKILL. Later calls raise an error that says ``why``."""
