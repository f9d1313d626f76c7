"""One rank's process and the parent's ends of its pipes."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
from collections.abc import Mapping

from multicard.ranks import wire

TAIL = 40
"""Lines of a rank's standard error that are kept for its obituary."""

LONGEST_LINE = 1 << 16
FIRST_FREE = 3  # the first descriptor after standard input, output and error


class RankProcess:
    """A child in a process group of its own: Ctrl-C reaches the parent alone, and its children can be ended with it.

    Attributes:
        commands: where the parent writes. The rank ends when this closes, which it does when the parent dies.
        reports, stdout, stderr: where the parent reads; none of these blocks.
        pidfd: readable when the process has ended.
    """

    def __init__(self, rank: int, command: list[str], env: Mapping[str, str]) -> None:
        self.rank = rank
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._reader = wire.Reader()
        with contextlib.ExitStack() as undo:
            theirs, self.commands = _pipe(undo)
            self.reports, they_report = _pipe(undo)
            self.stdout, their_stdout = _pipe(undo)
            self.stderr, their_stderr = _pipe(undo)
            self.popen = subprocess.Popen(
                [*command, str(theirs), str(they_report)],
                env=dict(env),
                pass_fds=(theirs, they_report),
                stdin=subprocess.DEVNULL,
                stdout=their_stdout,
                stderr=their_stderr,
                cwd=_folder(),
                process_group=0,
            )
            undo.callback(self._abandon)
            self.pidfd = os.pidfd_open(self.popen.pid)
            undo.pop_all()
        for fd in (theirs, they_report, their_stdout, their_stderr):
            os.close(fd)
        self._partial = {self.stdout: b"", self.stderr: b""}
        for fd in (self.commands, self.reports, self.stdout, self.stderr):
            os.set_blocking(fd, False)

    @property
    def readable(self) -> tuple[int, ...]:
        return self.reports, self.stdout, self.stderr, self.pidfd

    def write(self, data: bytes | memoryview) -> int:
        """Bytes written to the rank: 0 where its pipe is full or it is gone."""
        try:
            return os.write(self.commands, data[: 1 << 20])
        except OSError:
            return 0

    def read_reports(self) -> tuple[list[wire.Message], bool]:
        """The messages that are complete, and whether more may come."""
        try:
            return list(self._reader.read(self.reports)), True
        except BlockingIOError:
            return [], True
        except (EOFError, OSError):
            return [], False

    def read_output(self, fd: int) -> tuple[list[str], bool]:
        """Whole lines of what it printed, and whether more may come."""
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return [], True
        *whole, rest = (self._partial[fd] + chunk).split(b"\n")
        if rest and (not chunk or len(rest) > LONGEST_LINE):
            whole, rest = [*whole, rest], b""
        self._partial[fd] = rest
        lines = [line.decode(errors="replace") for line in whole]
        if fd == self.stderr:
            self.tail.extend(lines)
        return lines, bool(chunk)

    def last_line(self, fd: int) -> list[str]:
        """What it printed last where no newline came after it."""
        rest, self._partial[fd] = self._partial[fd], b""
        lines = [rest.decode(errors="replace")] if rest else []
        if fd == self.stderr:
            self.tail.extend(lines)
        return lines

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP, or a debugger, holds it."""
        try:
            status = pathlib.Path(f"/proc/{self.popen.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] in "Tt"

    def wake(self) -> None:
        """Let a stopped rank go on."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the rank, which may have left its process group, and to everything that it started."""
        if self.popen.returncode is not None:  # its number may be another's by now
            return
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.popen.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end and return its exit code, negative for a signal.

        Where this process is a container's first one, or a subreaper, what the rank had started has become its child.
        """
        code = self.popen.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self.popen.pid, 0)
        return code

    def close(self) -> None:
        for fd in (self.commands, *self.readable):
            os.close(fd)

    def _abandon(self) -> None:
        self.kill()
        self.popen.wait()


def _folder() -> str | None:
    """The caller's folder (None); where that was deleted the root, since torch can't be imported in none."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "/"
    return None


def _pipe(undo: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose ends aren't standard input, output or error, also where this process has closed those."""
    ends = []
    for fd in os.pipe():
        if fd < FIRST_FREE:
            fd, low = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE), fd
            os.close(low)
        undo.callback(os.close, fd)
        ends.append(fd)
    return ends[0], ends[1]
