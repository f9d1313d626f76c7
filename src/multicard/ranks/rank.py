"""A rank: a process that joins its job and then runs the commands from its parent's pipe, see ``multicard.launch``.

It has two threads: this one does the work, the other reads commands all the time. So the rank ends when its parent
does, whatever it is doing, and can always report what it is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import os
import queue
import runpy
import signal
import sys
import threading
from typing import Any

from multicard.ranks import activity, failure, wire
from multicard.ranks.family import kill_descendants
from multicard.ranks.kept import Shelf

PR_SET_PDEATHSIG = 1


class Rank:
    """This process's side of the pipes: commands arrive on one, reports leave on the other.

    A command of kind ``run`` is what ``do_run`` does; its value, or what it raises, is the answer.
    """

    def __init__(self, commands: int, reports: int) -> None:
        self._commands, self._reports = commands, reports
        self._inbox: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._shelf = Shelf()
        self._streams: dict[int, Any] = {}
        self.ran_script = False
        self._pid = os.getpid()

    def listen(self) -> None:
        """Read commands until their pipe closes, as it does when the parent dies: then so do we, and our children."""
        reader = wire.Reader()
        with contextlib.suppress(EOFError, OSError):
            while True:
                for message in reader.read(self._commands):
                    if message.kind == "inspect":
                        self._report("activity", message.call, activity.report())
                    else:
                        self._inbox.put(message)
        kill_descendants(os.getpid())
        os.killpg(0, signal.SIGKILL)

    def serve(self) -> None:
        """Run one command after the other until told to exit."""
        rank = int(os.environ["RANK"])
        while (message := self._inbox.get()).kind != "exit":
            try:
                self._report("value", message.call, getattr(self, f"do_{message.kind}")(message))
            except BaseException as error:
                self._report("error", message.call, failure.describe(error, rank))
            del message  # what a call was given is the caller's, not ours to hold on to

    def _report(self, kind: str, call: int, value: Any) -> None:
        if os.getpid() != self._pid:  # a function has called os.fork(), and its child has come back from it
            os._exit(0)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        message = wire.pack(kind, call, value)
        with self._writing:
            try:
                wire.write(self._reports, message)
            except OSError as error:
                os.write(
                    2, f"multicard: a function on this rank has closed its pipe to the parent ({error})\n".encode()
                )
                os._exit(1)

    def do_start(self, message: wire.Message) -> None:
        import multicard.collectives  # noqa: F401  the seconds that this takes are spent before ranks wait for each other

    def do_join(self, message: wire.Message) -> None:
        import torch.distributed as dist

        from multicard.mesh import init_mesh

        self._shelf.mesh = init_mesh(**message.load())
        if dist.is_initialized():
            dist.barrier()

    def do_run(self, message: wire.Message) -> Any:
        return self._shelf.call(*message.load())

    def do_open(self, message: wire.Message) -> None:
        """Begin a stream: what the function returns is iterated over by further commands of this call."""
        self._streams[message.call] = iter(self.do_run(message))

    def do_keep(self, message: wire.Message) -> None:
        """The same, of the shares done."""
        self._streams[message.call] = self._shelf.keep(*message.load())

    def do_next(self, message: wire.Message) -> list[Any]:
        """On rank 0 the stream's next item, if there is one."""
        items = list(itertools.islice(self._streams[message.call], 1))
        return items if self._shelf.mesh.rank == 0 else []

    def do_close(self, message: wire.Message) -> None:
        """Nobody waits for the answer to this, which is why it comes as another call's."""
        if (stream := self._streams.pop(message.load(), None)) is not None:
            stream.close()

    def do_drop(self, message: wire.Message) -> None:
        self._shelf.pop(message.load(), None)

    def do_script(self, message: wire.Message) -> None:
        from multicard.join import serve_scripts

        path, args = message.load()
        self.ran_script = True
        serve_scripts()
        sys.argv = [path, *args]
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            if error.code not in (None, 0):
                raise


def die_with_parent(parent: int, sent: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send a signal when the thread that started this process ends: it reaches even a stopped one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sent)
    if os.getppid() != parent:  # the parent died before this call
        os._exit(1)


def _own_environment() -> None:
    """Remove settings that only served to find multicard."""
    path = os.environ.pop("MULTICARD_PYTHONPATH", "")
    os.environ.pop("PYTHONPATH", None)
    if path:
        os.environ["PYTHONPATH"] = path


def main(commands: int, reports: int, store: int) -> None:
    """Be a rank that reads commands from one pipe, writes reports to another and finds the others in a file."""
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # lines are shown, and kept, as they come
    _own_environment()
    for fd in (commands, reports, store):
        os.set_inheritable(fd, False)
    os.environ["MULTICARD_STORE"] = str(store)
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
