"""Progress bars on standard error: for loading, and for a pipeline's steps, copied by the caller from rank 0."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

from multicard.mesh import ParallelMesh


@contextlib.contextmanager
def loading_bar(wanted: bool | None, label: str) -> Iterator[Callable[[float], None]]:
    """Gives a function that shows the fraction done, from 0 to 1. Shows nothing unless ``wanted`` (None: only on a
    terminal)."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda share: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=1.0)
        yield lambda share: progress.update(task, completed=share)


@contextlib.contextmanager
def steps_shown(pipe: Any, mesh: ParallelMesh, bar: str | bool) -> Iterator[None]:
    """The pipeline's own progress bar on rank 0, written to the named pipe ``bar``; True: to this rank's terminal."""
    if mesh.rank or not bar:
        pipe.set_progress_bar_config(disable=True)
        yield
    elif bar is True:
        pipe.set_progress_bar_config(disable=False)
        yield
    else:
        path, columns = str(bar).split(":")
        with open(path, "w", encoding="utf-8", buffering=1) as file:
            pipe.set_progress_bar_config(disable=False, file=file, ncols=int(columns))
            yield


@contextlib.contextmanager
def steps_bar(wanted: bool) -> Iterator[str | None]:
    """A named pipe, copied to standard error, and the terminal's width: ``path:columns``. None if not ``wanted``."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="multicard-") as folder:
        path = os.path.join(folder, "steps")
        os.mkfifo(path)
        reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # writable too: no end of file between two writers
        done = threading.Event()
        copier = threading.Thread(target=_copy, args=(reader, done), name="multicard-progress", daemon=True)
        copier.start()
        try:
            yield f"{path}:{shutil.get_terminal_size().columns}"
        finally:
            done.set()
            copier.join()
            os.close(reader)


def _copy(reader: int, done: threading.Event) -> None:
    """Copy text from ``reader`` to standard error until ``done`` is set and the pipe is empty."""
    while True:
        last = done.is_set()
        if select.select([reader], [], [], 0.0 if last else 0.05)[0]:
            sys.stderr.write(os.read(reader, 1 << 16).decode(errors="replace"))
            sys.stderr.flush()
        elif last:
            return
