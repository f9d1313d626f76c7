"""Start ranks on this host and run functions on them.

The caller is never a rank: each rank is a child process, started fresh, that gets its functions by cloudpickle on a
pipe. So closures, notebooks, threads and unguarded scripts work, and what happens to a rank can be told.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from multicard.config import ParallelConfig
from multicard.errors import CollectiveTimeout, ConfigError, RankError
from multicard.ranks import wire
from multicard.ranks.supervisor import GRACE, Supervisor


def launch(
    fn: Callable[..., Any],
    config: ParallelConfig,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Any]:
    """Run ``fn(mesh, *args, **kwargs)`` on every rank of ``config`` and return the values by rank.

    Tensors come back on the CPU. ``options`` are those of :class:`Ranks`.

    Raises:
        the first failing rank's own exception, with a note that names the rank, from :class:`RankError`.
        RankError: a rank died (by a signal, say) or raised what can't be pickled.
        CollectiveTimeout: a rank did not arrive at a collective within ``timeout``.
    """
    with Ranks(config, **options) as ranks:
        return ranks.run(fn, *args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """A value that every rank of a :class:`Ranks` keeps. As an argument it arrives as that rank's own object."""

    key: int


class Ranks:
    """Ranks kept alive between calls; a context manager.

    Args:
        config: the mesh; its ``world_size`` is the number of processes.
        timeout: seconds that one collective may wait; never bounds ``fn`` itself.
        start_timeout: seconds for all ranks to start and to meet at the first barrier.
        threads_per_rank: threads that each computes with; None: this process's cores ÷ ranks, unless
            OMP_NUM_THREADS says otherwise.
        backend: "auto", "shm", "gloo", or what ``torch.distributed`` knows.
        device: "auto", "cpu", "cuda", "npu", "xpu".
        check: compare every collective's arguments between ranks before it runs.
        env: environment variables of the ranks beside this process's own.
    """

    def __init__(
        self,
        config: ParallelConfig,
        *,
        timeout: float = 60.0,
        start_timeout: float = 300.0,
        threads_per_rank: int | None = None,
        backend: str = "auto",
        device: str = "auto",
        check: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self._options = {"config": config, "backend": backend, "device": device, "timeout": timeout}
        self._start_timeout = start_timeout
        self._threads = threads_per_rank
        self._env = dict(env or {})
        self._lock = threading.RLock()
        self._calls = 0
        self._broken: str | None = None
        self._start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the ranks can take another call."""
        return self._broken is None

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``fn(mesh, *args, **kwargs)`` on every rank: values by rank. Raises as :func:`launch` does."""
        with self._lock:
            call = self._send_all("run", (fn, args, kwargs))
            return [message.load() for message in self._collect(call)]

    def keep(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Kept:
        """``fn(mesh, *args, **kwargs)`` on every rank, where its value stays; pass the Kept to ``run`` or ``stream``."""
        with self._lock:
            call = self._send_all("keep", (fn, args, kwargs))
            self._collect(call)
            return Kept(call)

    def stream(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Iterate over what rank 0's ``fn(mesh, *args, **kwargs)``, a generator function run on every rank, yields.

        Ranks work on one item ahead of the caller. Dropping the iterator early closes every rank's generator after
        the same item.
        """
        with self._lock:
            call = self._send_all("stream", (fn, args, kwargs))
            self._tell("next", call)
            try:
                while (items := self._collect(call))[0].kind == "item":
                    self._tell("next", call)
                    yield items[0].load()
                    items = []
            finally:
                if self.alive:
                    if not items:
                        self._collect(call)
                    self._tell("close", call)
                    self._collect(call)

    def close(self) -> None:
        """End the ranks; they can't be used again."""
        self._broken = self._broken or "closed"
        self._supervisor.close()
        self._store = None

    # starting

    def _start(self) -> None:
        self._store, port = _host_store(self._start_timeout)
        environments = [self._environment(rank, port) for rank in range(self.config.world_size)]
        self._supervisor = Supervisor(environments, _to_console)
        try:
            self._tell("join", 0, self._options)
            self._collect(0, deadline=time.monotonic() + self._start_timeout)
        except BaseException:
            self._break("it did not start")
            raise

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        size = self.config.world_size
        threads = self._threads or os.environ.get("OMP_NUM_THREADS") or max(1, _cores() // size)
        own = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects to the store too: the parent hosts it
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(str(pathlib.Path(p).absolute()) for p in sys.path)),
        }
        return {**os.environ, **{name: str(value) for name, value in own.items()}, **self._env}

    # talking

    def _send_all(self, kind: str, value: Any) -> int:
        if self._broken is not None:
            raise RankError(f"these ranks are gone ({self._broken}): start new ones")
        self._calls += 1
        self._tell(kind, self._calls, value)
        return self._calls

    def _tell(self, kind: str, call: int, value: Any = None) -> None:
        message = wire.pack(kind, call, value)
        for rank in range(self.config.world_size):
            self._supervisor.send(rank, message)

    def _collect(self, call: int, deadline: float | None = None) -> list[wire.Message]:
        """One message of every rank, or the first failure raised."""
        answers: dict[int, wire.Message] = {}
        failures: dict[int, Exception] = {}
        try:
            while len(answers) + len(failures) < self.config.world_size:
                timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
                event = self._supervisor.events.get(timeout=timeout)
                if event.message is None:
                    failures.setdefault(event.rank, self._died(event.rank, event.returncode))
                elif event.message.kind == "error":
                    failures[event.rank] = _revive(event.rank, event.message)
                elif event.message.call == call:
                    answers[event.rank] = event.message
                if failures and deadline is None:
                    deadline = time.monotonic() + GRACE
        except BaseException as error:
            self._break("a call was interrupted")
            if type(error).__name__ != "Empty":
                raise
            if not failures:
                missing = sorted(set(range(self.config.world_size)) - set(answers))
                raise CollectiveTimeout(f"ranks {missing} did not start in time", rank=missing[0]) from None
        if failures:
            if any(isinstance(error, RankError) for error in failures.values()):
                self._break("a rank died")
            raise next(iter(failures.values()))
        return [answers[rank] for rank in range(self.config.world_size)]

    def _died(self, rank: int, returncode: int | None) -> RankError:
        tail = self._supervisor.tail(rank)
        return RankError(f"rank {rank} ended with exit code {returncode}\n{tail}", rank=rank, stderr=tail)

    def _break(self, why: str) -> None:
        self._broken = why
        self._supervisor.close(grace=0)


def _host_store(timeout: float) -> tuple[Any, int]:
    """A store in this process that listens on loopback only, on a port that is ours before anybody hears of it."""
    import torch.distributed as dist

    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        timeout=datetime.timedelta(seconds=timeout),
    )
    return store, port


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _to_console(rank: int, is_error: bool, line: str) -> None:
    if rank == 0:
        print(f"[{rank}] {line}", file=sys.stderr if is_error else sys.stdout, flush=True)


def _revive(rank: int, message: wire.Message) -> Exception:
    told = message.load()
    error = told["exception"].load() if told["exception"] is not None else None
    if error is None:
        return RankError(f"rank {rank} raised {told['type']}: {told['message']}\n{told['traceback']}", rank=rank)
    error.add_note(f"raised on rank {rank}:\n{told['traceback']}")
    error.__cause__ = RankError(f"rank {rank} raised {told['type']}", rank=rank)
    return error


__all__ = ["ConfigError", "Kept", "Ranks", "launch"]
