"""Ranks' output, in whole lines: rank 0's on the console with its number in front, every rank's in files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import IO

from multicard.errors import ConfigError

CONSOLE = ("rank0", "all", "none")


class Logs:
    """Where lines go: see ``log_dir``, ``console`` and ``log_mode`` of :class:`multicard.ranks.settings.Settings`.

    Raises:
        ConfigError: an unknown ``console``, or a ``directory`` that can't be written to.
    """

    def __init__(
        self,
        ranks: Iterable[int],
        directory: str | os.PathLike[str] | None = None,
        console: str = "rank0",
        mode: str = "w",
    ) -> None:
        if console not in CONSOLE:
            raise ConfigError(f"console={console!r}: must be one of {', '.join(CONSOLE)}")
        self._console = console
        self._files: dict[int, IO[str]] = {}
        if directory is not None:
            try:
                os.makedirs(directory, exist_ok=True)
                for rank in ranks:
                    path = os.path.join(directory, f"rank{rank}.log")
                    self._files[rank] = open(path, mode, encoding="utf-8", buffering=1)  # noqa: SIM115
            except OSError as error:
                self.close()
                raise ConfigError(f"log_dir={os.fspath(directory)!r}: {error.strerror}: {error.filename}") from None

    def write(self, rank: int, is_error: bool, line: str) -> None:
        """Write one line of a rank. A line that can't be written is dropped: that is no reason to end the job."""
        with contextlib.suppress(Exception):  # the disk is full
            if rank in self._files:
                self._files[rank].write(line + "\n")
        if self._console == "all" or (self._console == "rank0" and rank == 0):
            stream = sys.stderr if is_error else sys.stdout
            with contextlib.suppress(Exception):  # the console is closed, or its replacement raises
                stream.write(f"[{rank}] {line}\n")
                stream.flush()

    def close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
