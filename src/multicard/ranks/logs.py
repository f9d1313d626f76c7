"""What ranks print: whole lines only, rank 0's on the console with its number in front, everybody's in files."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from typing import IO

CONSOLE = ("rank0", "all", "none")


class Logs:
    """Where lines go.

    Args:
        directory: a folder that gets one ``rank<n>.log`` for every rank, standard output and error in one; or None.
        console: whose lines the caller's own standard output and error show: "rank0", "all" or "none".
        size: number of ranks.
        first: the number of the first one on this host.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, console: str = "rank0", size: int = 1, first: int = 0
    ) -> None:
        self._console = console
        self._first = first
        self._files: list[IO[str]] = []
        if directory is not None:
            folder = pathlib.Path(directory)
            folder.mkdir(parents=True, exist_ok=True)
            names = [folder / f"rank{first + i}.log" for i in range(size)]
            self._files = [name.open("w", encoding="utf-8", buffering=1) for name in names]

    def write(self, rank: int, is_error: bool, line: str) -> None:
        """One line of the ``rank``-th rank on this host."""
        if self._files:
            self._files[rank].write(line + "\n")
        number = self._first + rank
        if self._console == "all" or (self._console == "rank0" and number == 0):
            stream = sys.stderr if is_error else sys.stdout
            with contextlib.suppress(OSError, ValueError):  # a closed console is no reason to end the job
                stream.write(f"[{number}] {line}\n")
                stream.flush()

    def close(self) -> None:
        for file in self._files:
            file.close()
