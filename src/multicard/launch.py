"""Start ranks on this host and run functions on them.

The caller is never a rank: each rank is a new child process that receives its functions by cloudpickle through a pipe.
So closures, notebooks, threads and unguarded scripts work, and the caller learns of whatever happens to a rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

from multicard.config import ParallelConfig
from multicard.errors import UnsupportedError
from multicard.place import in_job
from multicard.ranks.children import Children
from multicard.ranks.crew import Crew
from multicard.ranks.kept import Kept
from multicard.ranks.patience import GRACE
from multicard.ranks.settings import Options, Settings


def launch(
    fn: Callable[..., Any],
    config: ParallelConfig,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> list[Any]:
    """Run ``fn(mesh, *args, **kwargs)`` on every rank of ``config`` and return the values by rank.

    Tensors come back on the CPU. Inside a job nothing is started: see :class:`Ranks`.

    Args:
        options: how ranks are started: timeout, start_timeout, threads_per_rank, backend, device, check,
            compare_inputs, log_dir, console, env. See :class:`multicard.ranks.settings.Settings`.

    Raises:
        the first failing rank's own exception, with a note that names the rank, from :class:`RankError`.
        RankError: a rank died (from a signal, for example) or raised an exception that can't be pickled.
        CollectiveTimeout: a rank did not arrive at a collective within ``timeout``.
        MismatchError: with ``check``, ranks disagreed about a collective.
    """
    with Ranks(config, **options) as ranks:
        return ranks.run(fn, *args, **(kwargs or {}))


class Ranks:
    """Ranks kept alive between calls; a context manager.

    Inside a job (torchrun, ``multicard run``, srun) none are started: every rank of the job makes the same calls, and
    functions run in the job's ranks. There, values must be tensors, numbers, strings, lists, tuples or dicts.

    After a call that fails in the same way on every rank, as when all refuse a prompt, the ranks stay in use. If a rank
    dies, hangs or fails alone, all are ended: further calls raise at once, and :meth:`restart` starts new ones.

    Args:
        config: the mesh; its ``world_size`` is the number of processes.
        options: as for :func:`launch`.

    Raises:
        ConfigError: an option that doesn't exist, or a value outside its limits.
        CollectiveTimeout: not all ranks had started within ``start_timeout``.
    """

    def __init__(self, config: ParallelConfig, **options: Unpack[Options]) -> None:
        self._settings = Settings.of(config, options)
        self._keys = itertools.count(1)
        self._kept: weakref.WeakKeyDictionary[Kept, tuple[Any, ...]] = weakref.WeakKeyDictionary()
        self._crew = self._start()

    @property
    def config(self) -> ParallelConfig:
        return self._settings.config

    @property
    def alive(self) -> bool:
        """Whether the ranks take further calls."""
        return self._crew.alive

    @property
    def told(self) -> bool:
        """Whether a call has raised because the ranks ended. If a rank dies while idle, the next call raises."""
        return self._crew.told

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; none inside a job."""
        return self._crew.pids

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``fn(mesh, *args, **kwargs)`` on every rank: values by rank. Raises as :func:`launch` does."""
        return self._crew.run(fn, args, kwargs)

    def keep(
        self,
        fn: Callable[..., Any],
        *args: Any,
        progress: Callable[[float], None] | None = None,
        **kwargs: Any,
    ) -> Kept:
        """``fn(mesh, *args, **kwargs)`` on every rank, where its value stays until the Kept is dropped.

        Pass the Kept as an argument of ``run``, ``keep`` or ``stream``. :meth:`restart` makes the value again.

        Args:
            fn: may be a generator function that yields the fraction done, from 0 to 1, equally often on every rank; the
                value is then its return value.
            progress: called with each fraction that rank 0 yields.
        """
        kept = Kept(next(self._keys))
        self._make(self._crew, kept, fn, args, kwargs, progress)
        self._kept[kept] = (fn, args, kwargs)
        weakref.finalize(kept, _drop, weakref.ref(self), kept.key)
        return kept

    def stream(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Run the generator function ``fn(mesh, *args, **kwargs)`` on every rank; iterate over the items of rank 0.

        Ranks compute one item ahead of the caller. Closing the iterator early closes every rank's generator after the
        same item. Other calls may be made in between.
        """
        return self._crew.stream(fn, args, kwargs)

    def restart(self, progress: Callable[[float], None] | None = None) -> None:
        """End the ranks, start new ones, and make their kept values again; ``progress`` as for :meth:`keep`.

        Raises:
            UnsupportedError: inside a job, whose ranks are its launcher's.
        """
        if not isinstance(self._crew, Children):
            raise UnsupportedError("restart() inside a job: a launcher started its ranks; start the job again")
        self.close()
        self._settings = dataclasses.replace(self._settings, log_mode="a")
        crew = self._start()
        try:
            for kept, (fn, args, kwargs) in sorted(self._kept.items(), key=lambda item: item[0].key):
                self._make(crew, kept, fn, args, kwargs, progress)
        except BaseException:  # without their kept values the ranks would fail in later calls
            crew.end("closed", GRACE)
            raise
        finally:
            self._crew = crew  # not before: another thread's call would not find what is kept

    def close(self) -> None:
        """End the ranks. Further calls raise. A job's ranks end with the job."""
        self._forget.detach()
        self._crew.end("closed", GRACE)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _make(
        crew: Crew, kept: Kept, fn: Any, args: Any, kwargs: Any, progress: Callable[[float], None] | None
    ) -> None:
        for share in crew.keep(kept.key, fn, args, kwargs):
            if progress is not None:
                progress(share)

    def _start(self) -> Crew:
        crew: Crew
        if in_job():
            from multicard.ranks.joined import Joined  # it imports torch, which is done while ranks start

            crew = Joined(self._settings)
        else:
            crew = Children(self._settings)
        self._forget = weakref.finalize(self, crew.end, "forgotten", GRACE)  # also when the interpreter exits
        try:
            crew.join()
        except BaseException:
            crew.end("they did not start", 0.0)
            raise
        return crew


def _drop(ranks: weakref.ref[Ranks], key: int) -> None:
    if (living := ranks()) is not None:
        living._crew.drop(key)
