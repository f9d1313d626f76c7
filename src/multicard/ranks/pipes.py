"""Pipes with descriptors other than those of standard input, output and error, even if these are closed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select

FIRST_FREE = 3  # the first descriptor after standard input, output and error


def pipe(undo: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe's read and write end; ``undo`` closes both."""
    read, write = os.pipe()
    return above_standard(read, undo), above_standard(write, undo)


def above_standard(fd: int, undo: contextlib.ExitStack) -> int:
    """``fd``, moved if it is one of the first three; ``undo`` closes it."""
    if fd < FIRST_FREE:
        fd, low = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE), fd
        os.close(low)
    undo.callback(os.close, fd)
    return fd


def ready(fd: int, event: int, timeout: float | None) -> bool:
    """Whether ``event`` occurs within ``timeout`` seconds; unlike ``select``, also for descriptors beyond 1023."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(None if timeout is None else timeout * 1000))
