"""The processes that a process has started, wherever they have gone: other process groups and sessions too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Collection

import psutil

PR_SET_CHILD_SUBREAPER = 36


def kill_descendants(pid: int) -> None:
    """SIGKILL to all processes that ``pid`` and their children have started and that have a living parent there."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def reap(keep: Collection[int]) -> None:
    """Wait for this process's children that have ended but for ``keep``; without any to keep, end the others first."""
    if not keep:
        kill_descendants(os.getpid())
        with contextlib.suppress(ChildProcessError):
            while True:  # what the ended ones had started too: it becomes this process's
                os.waitpid(-1, 0)
    for child in psutil.Process().children():
        if child.pid not in keep:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)
