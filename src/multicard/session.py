"""Ranks that have loaded a model and serve requests: the common base of ``LLM`` and ``DiffusionPipeline``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

from multicard.config import ParallelConfig
from multicard.errors import ConfigError
from multicard.launch import Ranks
from multicard.ranks.settings import Options

Bar = Callable[[], contextlib.AbstractContextManager[Callable[[float], None]]]
"""A progress bar: a context manager for the time of loading; gives a function that shows the fraction done (0 to 1)."""


class Session:
    """Starts ranks, each of which loads its part; they serve requests until :meth:`close`. A context manager.

    After a refused request the ranks stay in use. If a rank dies, the current request, or if there is none the next
    one, raises :class:`~multicard.errors.RankError`, and the request after that starts new ranks. Inside a job
    (torchrun, ``multicard run``) the job's own ranks are used, and every rank makes every call.

    Args:
        degrees: the mesh.
        options: how ranks are started.
        load: ``load(mesh, *args)`` runs on every rank, and its value stays there. A generator function yields the
            fraction done before it returns.
        bar: shown while the ranks load.
    """

    def __init__(
        self, degrees: ParallelConfig, options: Options, load: Callable[..., Any], *args: Any, bar: Bar
    ) -> None:
        self.degrees = degrees
        self._bar, self._closed = bar, False
        self._restarting = threading.RLock()  # requests of several threads may find at once that the ranks have ended
        self._ranks = Ranks(degrees, **options)
        try:
            with bar() as show:
                self._loaded = self._ranks.keep(load, *args, progress=show)
            self._after_loading()
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; none inside a job."""
        return self._ranks.pids

    def restart(self) -> None:
        """End the ranks, start new ones, and load again."""
        with self._restarting:
            with self._bar() as show:
                self._ranks.restart(progress=show)
            self._after_loading()

    def close(self) -> None:
        """End the ranks."""
        self._closed = True
        self._ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _after_loading(self) -> None:
        """Called once the ranks have loaded, for subclasses."""

    def _run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """``fn(mesh, loaded, *args)`` on every rank: values by rank."""
        return self._living().run(fn, self._loaded, *args)

    def _stream(self, fn: Callable[..., Any], *args: Any) -> Iterator[Any]:
        """The items of rank 0's generator ``fn(mesh, loaded, *args)``."""
        return self._living().stream(fn, self._loaded, *args)

    def _living(self) -> Ranks:
        """The ranks, restarted if they have ended and a request has raised for it."""
        if self._closed:
            raise ConfigError(f"this {type(self).__name__} is closed: make another")
        with self._restarting:
            if not self._ranks.alive and self._ranks.told:
                self.restart()
        return self._ranks
