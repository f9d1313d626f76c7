"""Pipes with descriptors other than those of standard input, output and error, even if these are closed."""

from __future__ import annotations

import contextlib
import fcntl
import os

SIZE = 1 << 20  # bytes: large values arrive in fewer pieces than through the usual 64 KiB
FIRST_FREE = 3  # the first descriptor after standard input, output and error


def pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe's read and write end, and who closes them."""
    read, write = os.pipe()
    with contextlib.suppress(OSError):  # a user may have only so many large ones
        fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, SIZE)
    return above_standard(read, reader), above_standard(write, writer)


def above_standard(fd: int, undo: contextlib.ExitStack) -> int:
    """``fd``, moved if it is one of the first three; ``undo`` closes it."""
    if fd < FIRST_FREE:
        fd, low = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE), fd
        os.close(low)
    undo.callback(os.close, fd)
    return fd
