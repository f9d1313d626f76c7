"""Files in memory without a name: only processes of this user that inherit one, or find it in /proc, can open it."""

from __future__ import annotations

import contextlib
import os
import tempfile

from multicard.errors import UnsupportedError


def memory_file(purpose: str) -> int:
    """A new file's descriptor. ``purpose`` shows in /proc, for people.

    Raises:
        UnsupportedError: this system has neither ``memfd_create`` nor a /dev/shm to write to.
    """
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a sandbox that forbids it
        fd = os.memfd_create(purpose)
        os.fchmod(fd, 0o600)
        return fd
    try:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise UnsupportedError(
            f"ranks can't share memory here: memfd_create fails, and so does a file in /dev/shm ({error.strerror})"
        ) from None


def check_proc() -> None:
    """Ranks find each other's memory, and learn of each other's deaths, through /proc.

    Raises:
        UnsupportedError: it is missing, can't be read, or belongs to another pid namespace than this process.
    """
    try:
        seen = os.readlink("/proc/self")
        os.listdir("/proc/self/fd")
    except OSError as error:
        raise UnsupportedError(f"/proc can't be read ({error.strerror}), which ranks need: mount it") from None
    if seen != str(os.getpid()):
        raise UnsupportedError(
            f"/proc shows this process as {seen} and not as {os.getpid()}: it belongs to another pid namespace; mount "
            "the namespace's own (unshare --mount-proc does)"
        )
