"""Supervising the processes of one job: they are started, read from and ended; none is left behind.

Each job has one thread for all of this. It also *starts* the ranks, because Linux ties the parent-death signal of a
child that isn't forked by a server to the thread that made it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import select
import selectors
import threading
import time
from collections.abc import Iterable, Mapping

from multicard.errors import CollectiveTimeout, RankError
from multicard.ranks import wire
from multicard.ranks.logs import Logs
from multicard.ranks.patience import GRACE
from multicard.ranks.pipes import ready
from multicard.ranks.process import RankProcess
from multicard.ranks.starter import ForkServer


@dataclasses.dataclass(frozen=True)
class Event:
    """An event of a rank: a message from it, or its end (``message`` None)."""

    rank: int
    message: wire.Message | None = None
    moment: float = dataclasses.field(default_factory=time.monotonic)


class Supervisor:
    """Starts a rank for each of ``environments`` (by rank), and puts their events in ``events``.

    ``server``, if given, forks them. If a rank ends unexpectedly, all others are ended, whatever the caller is doing.

    Attributes:
        events: messages and deaths, in the order in which they happened.
        dead: exit codes of the ranks that have ended, negative for a signal, as in ``subprocess``.
    """

    def __init__(
        self,
        environments: Mapping[int, dict[str, str]],
        logs: Logs,
        server: ForkServer | None,
        start_timeout: float,
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.dead: dict[int, int] = {}
        self.processes: dict[int, RankProcess] = {}
        self._logs, self._server, self._start_timeout = logs, server, start_timeout
        self._deadline: float | None = None  # the moment of SIGKILL
        self._lock = threading.Lock()  # held while writing to ranks and closing: a closed descriptor's number is reused
        self._wake_read, self._wake_write = os.pipe()
        self._started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(environments,), name="multicard-supervisor", daemon=True
        )
        self._thread.start()
        try:
            error = self._started.get()
        except BaseException:  # Ctrl-C while ranks are being started
            self.end(0.0)
            raise
        if error is not None:
            self._thread.join()
            raise error

    def send(self, rank: int, message: wire.Message, patience: float) -> None:
        """Write ``message`` to the rank; stops if it is dead, or reads nothing for ``patience`` seconds."""
        process = self.processes[rank]
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
                    ready(process.commands, select.POLLOUT, 0.05)

    def end(self, grace: float = GRACE) -> None:
        """End all ranks: by a command, and by SIGKILL after ``grace`` seconds. Returns when all are gone."""
        with self._lock:
            moment = time.monotonic() + grace
            self._deadline = moment if self._deadline is None else min(moment, self._deadline)
            if self._thread.is_alive():
                with contextlib.suppress(OSError):
                    os.write(self._wake_write, b"x")
        if threading.current_thread() is self._thread:
            return
        self._thread.join(max(0.0, moment - time.monotonic()) + 1.0)
        if self._thread.is_alive():  # a blocked print: the console or the disk takes no more
            for process in self.processes.values():
                process.kill()

    # the supervising thread

    def _run(self, environments: Mapping[int, dict[str, str]]) -> None:
        error = None
        try:
            self._start(environments)
        except BaseException as caught:
            error = caught
            self._deadline = time.monotonic()
        self._started.put(error)
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
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._wake_write = -1
            self._logs.close()

    def _start(self, environments: Mapping[int, dict[str, str]]) -> None:
        deadline = time.monotonic() + self._start_timeout

        def wait(fd: int) -> None:
            if not self._await(fd, deadline):
                missing = [str(rank) for rank in environments if rank not in self.processes]
                raise CollectiveTimeout(
                    f"ranks {', '.join(missing)} did not start within {self._start_timeout:g} s: torch is still being "
                    "imported",
                    rank=int(missing[0]),
                    collective="start",
                )

        for rank, env in environments.items():
            try:
                self.processes[rank] = RankProcess(rank, env, self._server, wait)
            except CollectiveTimeout:  # an OSError too
                raise
            except OSError as error:  # for example no more descriptors (ulimit -n) or processes (ulimit -u)
                raise RankError(f"rank {rank} can't be started: {error}", rank=rank) from error

    def _await(self, fd: int, deadline: float) -> bool:
        """Wait until ``fd`` is readable; False if that takes too long.

        Raises:
            RankError: :meth:`end` was called meanwhile.
        """
        poll = select.poll()
        for each in (fd, self._wake_read):
            poll.register(each, select.POLLIN)
        found = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self._wake_read in found:
            raise RankError("these ranks were ended while they were being started")
        return bool(found)

    def _supervise(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            owners = {fd: process for process in self.processes.values() for fd in process.readable}
            for fd in owners:
                selector.register(fd, selectors.EVENT_READ)
            exiting = False
            while len(self.dead) < len(self.processes):
                timeout = None
                if self._deadline is not None:
                    if not exiting:
                        exiting = self._tell_all_to_exit()
                    timeout = self._deadline - time.monotonic()
                    if timeout <= 0:
                        return
                for key, _ in selector.select(timeout):
                    if key.fd == self._wake_read:
                        os.read(self._wake_read, 64)
                        continue
                    process = owners[key.fd]
                    if key.fd == process.pidfd:
                        _forget(selector, process.readable)
                        self._bury(process)
                    elif not self._listen(process, key.fd):
                        _forget(selector, [key.fd])

    def _tell_all_to_exit(self) -> bool:
        for process in self.processes.values():
            process.write(b"".join(wire.Message("exit", 0).encode()))
        return True

    def _listen(self, process: RankProcess, fd: int) -> bool:
        """Read available data; False at the end of the pipe."""
        if fd == process.reports:
            messages, more = process.read_reports()
            for message in messages:
                self.events.put(Event(process.rank, message))
            return more
        lines, more = process.read_output(fd)
        self._print(process, fd, lines)
        return more

    def _print(self, process: RankProcess, fd: int, lines: Iterable[str]) -> None:
        for line in lines:
            self._logs.write(process.rank, fd == process.stderr, line)

    def _bury(self, process: RankProcess) -> None:
        """Wait for a rank that has ended; its last messages come before the event of its end."""
        process.kill()  # its children, while its process id can't be reused
        for fd in (process.reports, process.stdout, process.stderr):
            while ready(fd, select.POLLIN, 0) and self._listen(process, fd):
                pass
        for fd in (process.stdout, process.stderr):
            self._print(process, fd, process.last_line(fd))
        self.dead[process.rank] = process.wait()
        self.events.put(Event(process.rank))
        if self._deadline is None:
            self._deadline = time.monotonic() + GRACE


def _forget(selector: selectors.BaseSelector, fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(KeyError):
            selector.unregister(fd)
