"""A rank: a process that joins its job and then runs the commands from its parent's pipe, see ``multicard.launch``.

It has two threads: this one does the work, the other reads commands all the time. So the rank ends when its parent
does, whatever it is doing, and can always report what it is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import queue
import runpy
import signal
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from multicard.ranks.kept import Shelf

if TYPE_CHECKING:
    from multicard.ranks import wire

PR_SET_PDEATHSIG = 1


class Rank:
    """This process's side of the pipes: commands arrive on one, reports leave on the other."""

    def __init__(self, commands: int, reports: int) -> None:
        self._commands, self._reports = commands, reports
        self._inbox: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._mesh: Any = None
        self._shelf = Shelf()
        self._streams: dict[int, Any] = {}
        self.ran_script = False
        self._handlers: dict[str, Callable[[wire.Message], Any]] = {
            "start": self._start,
            "join": self._join,
            "run": self._run,
            "keep": self._keep,
            "open": self._open,
            "next": self._next,
            "script": self._script,
        }

    def listen(self) -> None:
        """Read commands until their pipe closes, as it does when the parent dies; then end this rank and children."""
        from multicard.ranks import wire

        reader = wire.Reader()
        with contextlib.suppress(EOFError, OSError):
            while True:
                for message in reader.read(self._commands):
                    if message.kind == "inspect":
                        self._inspect(message)
                    else:
                        self._inbox.put(message)
        os.killpg(0, signal.SIGKILL)

    def serve(self) -> None:
        """Run one command after the other until one says to exit."""
        from multicard.ranks import failure

        number = int(os.environ["RANK"])
        while (message := self._inbox.get()).kind != "exit":
            if message.kind in ("drop", "close"):
                self._forget(message)
                continue
            try:
                value = self._handlers[message.kind](message)
                kind = "end" if value is _END else "value"
                self._report(kind, message.call, None if value is _END else value)
            except BaseException as error:
                self._report("error", message.call, failure.describe(error, number))
            del message  # don't hold on to a call's arguments and value
            value = None

    def _report(self, kind: str, call: int, value: Any = None) -> None:
        from multicard.ranks import wire

        with contextlib.suppress(Exception):
            sys.stdout.flush()
        message = wire.pack(kind, call, value)
        with self._writing:
            wire.write(self._reports, message)

    def _inspect(self, message: wire.Message) -> None:
        from multicard.ranks import activity

        self._report("activity", message.call, activity.report())

    # commands

    def _start(self, message: wire.Message) -> None:
        import multicard.collectives  # noqa: F401  takes seconds, so it is done before ranks wait for each other

    def _join(self, message: wire.Message) -> None:
        import torch.distributed as dist

        from multicard.mesh import init_mesh

        self._mesh = init_mesh(**message.load())
        if dist.is_initialized():
            dist.barrier()

    def _run(self, message: wire.Message) -> Any:
        return self._call(*message.load())

    def _keep(self, message: wire.Message) -> bool:
        """Whether the value comes from a generator, which is then this call's stream."""
        key, *call = message.load()
        value: Any = self._call(*call)
        if isinstance(value, types.GeneratorType):
            self._streams[message.call] = self._shelf.fill(key, value)
            return True
        self._shelf[key] = value
        return False

    def _call(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = self._shelf.resolve(args, kwargs)
        return fn(self._mesh, *args, **kwargs)

    def _open(self, message: wire.Message) -> None:
        self._streams[message.call] = self._run(message)

    def _next(self, message: wire.Message) -> Any:
        item = next(self._streams[message.call], _END)
        return item if item is _END or self._mesh.rank == 0 else None

    def _forget(self, message: wire.Message) -> None:
        if message.kind == "drop":
            self._shelf.pop(message.call, None)
            return
        generator = self._streams.pop(message.call, None)
        if generator is not None:
            with contextlib.suppress(Exception):
                generator.close()

    def _script(self, message: wire.Message) -> None:
        path, args = message.load()
        self.ran_script = True
        sys.argv = [path, *args]
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            if error.code not in (None, 0):
                raise


_END = object()
"""Stands for the end of a generator."""


def die_with_parent(parent: int) -> None:
    """Have the kernel send SIGKILL when the thread that started this rank ends: it reaches even a stopped rank."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before this call
        os._exit(1)


def _own_environment() -> None:
    """Remove settings that only served to find multicard."""
    path = os.environ.pop("MULTICARD_PYTHONPATH", "")
    os.environ.pop("PYTHONPATH", None)
    if path:
        os.environ["PYTHONPATH"] = path


def main(commands: int, reports: int) -> None:
    """Run as a rank that reads commands from one pipe and writes reports to the other."""
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # lines are shown, and kept, as they come
    _own_environment()
    os.set_inheritable(commands, False)
    os.set_inheritable(reports, False)
    rank = Rank(commands, reports)
    threading.Thread(target=rank.listen, name="multicard-commands", daemon=True).start()
    rank.serve()
    if not rank.ran_script:  # no exit handlers to run, and this is quicker
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    main(*map(int, sys.argv[2:]))
