"""The processes of one job as their parent sees them: started, listened to, ended; none is left behind.

One thread a job does all of it. It also *starts* the ranks, because Linux ties a child's parent-death signal to the
thread that made it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import queue
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from multicard.ranks import wire

GRACE = 0.3
"""Seconds that ranks have to end by themselves once one has failed or the job is closed; then SIGKILL."""

TAIL = 40
"""Lines of each rank's standard error that are kept for the error message."""


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to a rank: a message from it, or its end."""

    rank: int
    message: wire.Message | None = None
    returncode: int | None = None


class _Process:
    """One rank: its process and the parent's ends of its pipes."""

    def __init__(self, rank: int, command: list[str], env: Mapping[str, str]) -> None:
        self.rank = rank
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.reader = wire.Reader()
        child_commands, self.commands = os.pipe()
        self.reports, child_reports = os.pipe()
        try:
            self.popen = subprocess.Popen(
                [*command, str(child_commands), str(child_reports)],
                env=dict(env),
                pass_fds=(child_commands, child_reports),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,  # its own: Ctrl-C goes to the parent alone, and its children can be killed with it
            )
        except BaseException:
            os.close(self.commands)
            os.close(self.reports)
            raise
        finally:
            os.close(child_commands)
            os.close(child_reports)
        os.set_blocking(self.commands, False)
        os.set_blocking(self.reports, False)
        self.pidfd = os.pidfd_open(self.popen.pid)

    def kill(self) -> None:
        """SIGKILL to the rank and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self) -> None:
        for fd in (self.commands, self.reports, self.pidfd):
            with contextlib.suppress(OSError):
                os.close(fd)
        for stream in (self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()


class Supervisor:
    """Starts ``len(environments)`` ranks and puts what happens to them in ``events``."""

    def __init__(self, environments: list[dict[str, str]], output: Callable[[int, bool, str], None]) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.dead: dict[int, int] = {}
        self._output = output
        self._processes: list[_Process] = []
        self._environments = environments
        self._wake_read, self._wake_write = os.pipe()
        self._closing: float | None = None  # the moment of SIGKILL
        self._started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="multicard-supervisor", daemon=True)
        self._thread.start()
        error = self._started.get()
        if error is not None:
            self._thread.join()
            raise error

    @property
    def pids(self) -> list[int]:
        return [process.popen.pid for process in self._processes]

    def tail(self, rank: int) -> str:
        """The last lines of the rank's standard error."""
        return "\n".join(self._processes[rank].tail)

    def send(self, rank: int, message: wire.Message) -> None:
        """Write ``message`` to the rank; gives up silently once the rank is dead or the job is closing."""
        process = self._processes[rank]
        for part in message.encode():
            view = memoryview(part)
            while view:
                if rank in self.dead or self._closing is not None:
                    return
                try:
                    view = view[os.write(process.commands, view[: 1 << 20]) :]
                except BlockingIOError:
                    select.select([], [process.commands], [], 0.1)
                except OSError:  # the rank is gone; its end is an event of its own
                    return

    def close(self, grace: float = GRACE) -> None:
        """End all ranks: their command pipes say so, and SIGKILL after ``grace`` seconds. Returns when all are gone."""
        if self._closing is None or grace == 0:
            self._closing = time.monotonic() + grace
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")
        self._thread.join()

    # the supervising thread

    def _run(self) -> None:
        try:
            command = [sys.executable, "-P", "-m", "multicard._rank"]
            for rank, env in enumerate(self._environments):
                self._processes.append(_Process(rank, command, env))
        except BaseException as error:
            self._started.put(error)
            self._closing = time.monotonic()
        else:
            self._started.put(None)
        try:
            self._supervise()
        finally:
            for process in self._processes:
                process.kill()
                process.popen.wait()
                process.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _supervise(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for process in self._processes:
                self._register(selector, process)
            told = False
            while True:
                timeout = None
                if self._closing is not None:
                    if not told:
                        told = self._tell_all_to_exit()
                    timeout = self._closing - time.monotonic()
                    if len(self.dead) == len(self._processes) or timeout <= 0:
                        return
                for key, _ in selector.select(timeout):
                    if key.data is not None:
                        key.data(selector)
                    else:
                        os.read(self._wake_read, 64)

    def _tell_all_to_exit(self) -> bool:
        for process in self._processes:
            with contextlib.suppress(OSError):
                os.write(process.commands, b"".join(wire.Message("exit", 0).encode()))
        return True

    def _register(self, selector: selectors.BaseSelector, process: _Process) -> None:
        selector.register(process.reports, selectors.EVENT_READ, lambda s: self._read_reports(s, process))
        for stream, is_error in ((process.popen.stdout, False), (process.popen.stderr, True)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            lines = _Lines(lambda text, e=is_error: self._on_line(process, e, text))
            selector.register(stream, selectors.EVENT_READ, lambda s, f=stream, w=lines: self._read_lines(s, f, w))
        selector.register(process.pidfd, selectors.EVENT_READ, lambda s: self._on_exit(s, process))

    def _read_reports(self, selector: selectors.BaseSelector, process: _Process) -> None:
        try:
            for message in process.reader.read(process.reports):
                self.events.put(Event(process.rank, message))
        except BlockingIOError:
            pass
        except (EOFError, OSError):
            selector.unregister(process.reports)

    def _read_lines(self, selector: selectors.BaseSelector, stream: Any, lines: _Lines) -> None:
        try:
            chunk = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return
        lines.feed(chunk)
        if not chunk:
            selector.unregister(stream)

    def _on_line(self, process: _Process, is_error: bool, line: str) -> None:
        if is_error:
            process.tail.append(line)
        self._output(process.rank, is_error, line)

    def _on_exit(self, selector: selectors.BaseSelector, process: _Process) -> None:
        selector.unregister(process.pidfd)
        for key in list(selector.get_map().values()):  # what it said last comes before its end
            if key.fileobj in (process.reports, process.popen.stdout, process.popen.stderr):
                _drain(selector, key)
        returncode = process.popen.wait()
        self.dead[process.rank] = returncode
        self.events.put(Event(process.rank, returncode=returncode))


def _drain(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    while key.fd in selector.get_map() and select.select([key.fd], [], [], 0)[0]:
        key.data(selector)


class _Lines:
    """Cuts what is written to a pipe into whole lines."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._write(line.decode(errors="replace"))
        if not chunk and self._rest:
            self._write(self._rest.decode(errors="replace"))
            self._rest = b""
