"""A rank: a fresh process that joins its job and then does what its parent's pipe says. Run by ``multicard.launch``."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from typing import Any

from multicard.ranks import wire


class Rank:
    """This process's side of the pipes: commands arrive on one, reports leave on the other."""

    def __init__(self, commands: int, reports: int) -> None:
        self.commands, self.reports = commands, reports
        self.inbox: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
        self._kept: dict[int, Any] = {}
        self._mesh: Any = None

    def listen(self) -> None:
        """Read commands until the pipe closes, which it does when the parent dies: then so do we."""
        reader = wire.Reader()
        try:
            while True:
                for message in reader.read(self.commands):
                    if message.kind == "exit":
                        os._exit(0)
                    self.inbox.put(message)
        except (EOFError, OSError):
            os._exit(1)

    def report(self, kind: str, call: int, value: Any = None) -> None:
        wire.write(self.reports, wire.pack(kind, call, value))

    def report_error(self, call: int, error: BaseException) -> None:
        wire.write(self.reports, wire.pack("error", call, _describe(error)))

    def serve(self) -> None:
        """Join the job, say so, then run one command after the other."""
        try:
            self._join(self.inbox.get().load())
        except BaseException as error:
            self.report_error(0, error)
            return
        self.report("ready", 0)
        while True:
            message = self.inbox.get()
            try:
                getattr(self, f"_on_{message.kind}")(message)
            except BaseException as error:
                self.report_error(message.call, error)
            del message

    def _join(self, options: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        from multicard.mesh import init_mesh

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._mesh = init_mesh(**options)
        if dist.is_initialized():
            dist.barrier()

    def _arguments(self, message: wire.Message) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        fn, args, kwargs = message.load()
        args = tuple(self._own(value) for value in args)
        return fn, args, {name: self._own(value) for name, value in kwargs.items()}

    def _own(self, value: Any) -> Any:
        """A Kept argument stands for the object that this rank keeps."""
        return self._kept[value.key] if type(value).__name__ == "Kept" and hasattr(value, "key") else value

    def _on_run(self, message: wire.Message) -> None:
        fn, args, kwargs = self._arguments(message)
        self.report("value", message.call, fn(self._mesh, *args, **kwargs))

    def _on_keep(self, message: wire.Message) -> None:
        fn, args, kwargs = self._arguments(message)
        self._kept[message.call] = fn(self._mesh, *args, **kwargs)
        self.report("value", message.call)

    def _on_drop(self, message: wire.Message) -> None:
        self._kept.pop(message.call, None)

    def _on_stream(self, message: wire.Message) -> None:
        fn, args, kwargs = self._arguments(message)
        generator = fn(self._mesh, *args, **kwargs)
        while True:
            step = self.inbox.get()
            if step.kind != "next":
                generator.close()
                break
            try:
                item = next(generator)
            except StopIteration:
                self.report("end", message.call)
            else:
                self.report("item", message.call, item if self._mesh.rank == 0 else None)
        self.report("value", message.call)


def _describe(error: BaseException) -> dict[str, Any]:
    """What the parent needs to raise ``error`` again: itself where it pickles, its text where not."""
    text = "".join(traceback.format_exception(error))
    try:
        pickled = wire.pack("", 0, error.with_traceback(None))
        pickled.load()
    except Exception:
        pickled = None
    return {"type": type(error).__name__, "message": str(error), "traceback": text, "exception": pickled}


def main() -> None:
    commands, reports = map(int, sys.argv[1:3])
    os.set_inheritable(commands, False)
    os.set_inheritable(reports, False)
    rank = Rank(commands, reports)
    threading.Thread(target=rank.listen, name="multicard-commands", daemon=True).start()
    rank.serve()


if __name__ == "__main__":
    main()
