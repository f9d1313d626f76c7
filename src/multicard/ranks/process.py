"""One rank's process and the parent's ends of its pipes."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import signal
from collections.abc import Callable, Mapping
from multiprocessing import connection

from multicard.ranks import starter, wire
from multicard.ranks.family import kill_descendants
from multicard.ranks.pipes import pipe

TAIL = 40
"""Lines of a rank's standard error that are kept for the error if it dies."""

LONGEST_LINE = 1 << 16


class RankProcess:
    """A child in its own process group: Ctrl-C reaches only the parent, and the rank's children can be ended with it.

    Attributes:
        commands: the parent writes here. The rank ends when this closes, as it does when the parent dies.
        reports, stdout, stderr: the parent reads here; none of these blocks.
        pidfd: readable when the process has ended.
    """

    def __init__(
        self,
        rank: int,
        env: Mapping[str, str],
        store: int,
        server: starter.ForkServer | None,
        wait: Callable[[int], None],
    ) -> None:
        self.rank = rank
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._reader = wire.Reader()
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            commands, self.commands = pipe(theirs, ours)
            self.reports, reports = pipe(ours, theirs)
            self.stdout, stdout = pipe(ours, theirs)
            self.stderr, stderr = pipe(ours, theirs)
            self._process = starter.start(env, (commands, reports, stdout, stderr, store), server, wait)
            ours.callback(self._process.wait)
            ours.callback(self.kill)  # before that
            self.pidfd = os.pidfd_open(self.pid)
            ours.pop_all()
        self._partial = {self.stdout: b"", self.stderr: b""}
        for fd in (self.commands, self.reports, self.stdout, self.stderr):
            os.set_blocking(fd, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def readable(self) -> tuple[int, ...]:
        return self.reports, self.stdout, self.stderr, self.pidfd

    def write(self, data: bytes | memoryview) -> int:
        """Write to the rank; returns the bytes written: 0 if its pipe is full or it is gone."""
        try:
            return os.write(self.commands, data[: 1 << 20])
        except OSError:
            return 0

    def read_reports(self) -> tuple[list[wire.Message], bool]:
        """The complete messages, and whether more may come."""
        try:
            return list(self._reader.read(self.reports)), True
        except BlockingIOError:
            return [], True
        except (EOFError, OSError):
            return [], False
        except (ValueError, TypeError):
            self.tail.append("multicard: a function on this rank has written to a descriptor of multicard's")
            self.kill()
            return [], False

    def read_output(self, fd: int, last: bool = False) -> tuple[list[str], bool]:
        """Whole lines of what it printed, and whether more may come; the ``last`` one has no newline maybe."""
        try:
            chunk = os.read(fd, 1 << 16)
            more = bool(chunk)
        except BlockingIOError:
            chunk, more = b"", True
        *whole, rest = (self._partial[fd] + chunk).split(b"\n")
        if rest and (last or not more or len(rest) > LONGEST_LINE):
            whole, rest = [*whole, rest], b""
        self._partial[fd] = rest
        lines = [line.decode(errors="replace") for line in whole]
        if fd == self.stderr:
            self.tail.extend(lines)
        return lines, more

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP or a debugger has stopped it."""
        try:
            status = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] in "Tt"

    def wake(self) -> None:
        """Continue a stopped rank."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL to the rank, which may have left its process group, and to all processes that it started."""
        if self._process.returncode is not None:  # its process id may have been reused
            return
        kill_descendants(self.pid)
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end and return its exit code, negative for a signal.

        If this process is a container's first one, or a subreaper, the rank's children have become its own: wait for
        them too.
        """
        connection.wait([self.pidfd])
        code = self._process.wait()
        if isinstance(self._process, starter.Forked) and self._process.orphaned:
            self.tail.append(f"multicard: process {self._process.server}, which it was forked from, has ended")
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self.pid, 0)
        return code

    def close(self) -> None:
        for fd in (self.commands, *self.readable):
            os.close(fd)
