"""Pipes whose ends stay clear of standard input, output and error, also where this process has closed those."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select

FIRST_FREE = 3  # the first descriptor after standard input, output and error


def pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe's read and write end, and who closes them."""
    read, write = os.pipe()
    return above_standard(read, reader), above_standard(write, writer)


def above_standard(fd: int, undo: contextlib.ExitStack) -> int:
    """``fd``, moved where it is one of the first three; ``undo`` closes it."""
    if fd < FIRST_FREE:
        fd, low = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE), fd
        os.close(low)
    undo.callback(os.close, fd)
    return fd


def ready(fd: int, event: int, timeout: float | None) -> bool:
    """Whether ``event`` is there within ``timeout`` seconds, for descriptors beyond 1023 too, unlike ``select``."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(None if timeout is None else timeout * 1000))
