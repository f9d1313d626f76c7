"""Ctrl-C and SIGTERM while a command runs."""

from __future__ import annotations

import os
import signal
import threading

INTERRUPTED = 130
"""The exit code."""


class Interrupts:
    """Make Ctrl-C and SIGTERM raise KeyboardInterrupt, once; ranks and files are then cleaned up.

    Some imports swallow all exceptions: if the process still runs after ``PATIENCE`` seconds, it is ended, and its
    ranks with it.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)
    PATIENCE = 1.5

    def __init__(self) -> None:
        self._pressed, self._done = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="multicard-interrupts", daemon=True).start()
        self._before = {number: signal.signal(number, self._interrupt) for number in self.NUMBERS}

    def restore(self) -> None:
        """Restore the signal handlers."""
        self._done.set()
        self._pressed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, *_: object) -> None:
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        self._pressed.set()
        raise KeyboardInterrupt

    def _watch(self) -> None:
        self._pressed.wait()
        if not self._done.wait(self.PATIENCE):
            os.write(2, b"multicard: interrupted\n")
            os._exit(INTERRUPTED)
