"""Supervising the processes of one job: they are started, read from and ended; none is left behind.

Each job has one thread for all of this. It also *starts* the ranks, because Linux ties the parent-death signal of a
child that isn't forked by a server to the thread that made it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import selectors
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from multiprocessing import connection

from multicard.errors import CollectiveTimeout, RankError
from multicard.memory import memory_file
from multicard.ranks import environment, wire
from multicard.ranks.logs import Logs
from multicard.ranks.patience import GRACE
from multicard.ranks.process import RankProcess
from multicard.ranks.settings import Settings
from multicard.ranks.starter import ForkServer


class Supervisor:
    """Starts this host's ranks, whose store is at ``port``, and puts what happens to them in ``events``.

    ``server``, if given, forks them. If a rank ends unexpectedly, all others are ended, whatever the caller is doing.

    Attributes:
        events: what happened to which rank when, in that order: a message from it, or its end (None).
        dead: exit codes of the ranks that have ended, negative for a signal, as in ``subprocess``.
    """

    def __init__(self, settings: Settings, port: int, server: ForkServer | None) -> None:
        self._logs = Logs(settings.ranks, settings.log_dir, settings.console, settings.log_mode)
        self._server, self._start_timeout = server, settings.start_timeout
        self._store = memory_file("multicard-store")
        environments = {rank: environment.of_rank(settings, rank, port) for rank in settings.ranks}
        self.events: queue.SimpleQueue[tuple[int, wire.Message | None, float]] = queue.SimpleQueue()
        self.dead: dict[int, int] = {}
        self.processes: dict[int, RankProcess] = {}
        self._deadline: float | None = None  # the moment of SIGKILL
        self._lock = threading.Lock()  # held to write to ranks and to close: a closed descriptor's number is reused
        self._wake = os.eventfd(0)
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(environments, started), name="multicard-supervisor", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except BaseException:  # also Ctrl-C while ranks are being started
            self.end(0.0)
            raise

    def send(self, rank: int, message: wire.Message, patience: float) -> None:
        """Write ``message`` to the rank; given up once it is dead, or takes nothing for ``patience`` seconds."""
        process, writable = self.processes[rank], select.poll()
        writable.register(process.commands, select.POLLOUT)
        deadline = time.monotonic() + patience
        for part in message.encode():
            view = memoryview(part)
            while view:
                with self._lock:
                    if rank in self.dead or self._deadline is not None:
                        return
                    written = process.write(view)
                if written:
                    view = view[written:]
                    deadline = time.monotonic() + patience
                elif time.monotonic() > deadline:
                    return
                else:
                    writable.poll(50)

    def end(self, grace: float = GRACE) -> None:
        """End all ranks: by a command, and by SIGKILL after ``grace`` seconds. Returns when all are gone."""
        with self._lock:
            moment = time.monotonic() + grace
            self._deadline = moment if self._deadline is None else min(moment, self._deadline)
            if self._thread.is_alive():
                with contextlib.suppress(OSError):
                    os.eventfd_write(self._wake, 1)
        if threading.current_thread() is self._thread:
            return
        self._thread.join(max(0.0, moment - time.monotonic()) + 1.0)
        if self._thread.is_alive():  # a blocked print: the console or the disk takes no more
            for process in self.processes.values():
                process.kill()

    # the supervising thread

    def _run(self, environments: Mapping[int, dict[str, str]], started: Future[None]) -> None:
        try:
            self._start(environments)
        except BaseException as error:
            self._deadline = time.monotonic()
            started.set_exception(error)
        else:
            started.set_result(None)
        try:
            self._supervise()
        finally:
            survivors = [process for process in self.processes.values() if process.rank not in self.dead]
            for process in survivors:
                process.kill()
            for process in survivors:
                self._bury(process)
            with self._lock:
                for process in self.processes.values():
                    process.close()
                os.close(self._store)
                os.close(self._wake)
                self._wake = -1
            self._logs.close()

    def _start(self, environments: Mapping[int, dict[str, str]]) -> None:
        deadline = time.monotonic() + self._start_timeout

        def wait(fd: int) -> None:
            """Until ``fd`` can be read."""
            found = connection.wait([fd, self._wake], max(0.0, deadline - time.monotonic()))
            if self._wake in found:
                raise RankError("these ranks were ended while they were being started")
            if not found:
                missing = [rank for rank in environments if rank not in self.processes]
                text = f"ranks {', '.join(map(str, missing))} did not start within {self._start_timeout:g} s"
                raise CollectiveTimeout(f"{text}: torch is still being imported", rank=missing[0], collective="start")

        for rank, env in environments.items():
            try:
                self.processes[rank] = RankProcess(rank, env, self._store, self._server, wait)
            except CollectiveTimeout:  # an OSError too
                raise
            except OSError as error:  # for example no more descriptors (ulimit -n) or processes (ulimit -u)
                raise RankError(f"rank {rank} can't be started: {error}", rank=rank) from error

    def _supervise(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            for process in self.processes.values():
                for fd in process.readable:
                    selector.register(fd, selectors.EVENT_READ, process)
            told = False
            while len(self.dead) < len(self.processes):
                timeout = None
                if self._deadline is not None:
                    for process in self.processes.values() if not told else ():
                        process.write(b"".join(wire.Message("exit", 0).encode()))
                    told = True
                    timeout = self._deadline - time.monotonic()
                    if timeout <= 0:
                        return
                for key, _ in selector.select(timeout):
                    if key.data is None:
                        os.eventfd_read(self._wake)
                    elif key.fd == key.data.pidfd:
                        _forget(selector, key.data.readable)
                        self._bury(key.data)
                    elif not self._listen(key.data, key.fd):
                        _forget(selector, [key.fd])

    def _listen(self, process: RankProcess, fd: int, last: bool = False) -> bool:
        """Read what is there; False at its end."""
        if fd == process.reports:
            messages, more = process.read_reports()
            for message in messages:
                self.events.put((process.rank, message, time.monotonic()))
        else:
            lines, more = process.read_output(fd, last)
            for line in lines:
                self._logs.write(process.rank, fd == process.stderr, line)
        return more

    def _bury(self, process: RankProcess) -> None:
        """Wait for a rank that has ended; its last messages come before the event of its end."""
        process.kill()  # its children, while its process id can't be reused
        for fd in (process.reports, process.stdout, process.stderr):
            while connection.wait([fd], 0) and self._listen(process, fd):
                pass
            self._listen(process, fd, last=True)
        self.dead[process.rank] = process.wait()
        self.events.put((process.rank, None, time.monotonic()))
        if self._deadline is None:
            self._deadline = time.monotonic() + GRACE


def _forget(selector: selectors.BaseSelector, fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(KeyError):
            selector.unregister(fd)
