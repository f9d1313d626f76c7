"""Starting ranks: forked from a process that has already imported torch, or as fresh processes.

Most of a rank's start is importing torch. The first job of a caller starts a fork server
(:mod:`multicard.ranks.forkserver`), which runs until the caller ends. A rank inherits environment, limits and cores
from the server instead of the caller; if any of these has changed, a new server is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing import connection
from typing import Any

from multicard.ranks.pipes import above_standard, pipe

PATIENCE = 10.0
"""Seconds for a server to report a dead rank's exit code."""

_ATTRIBUTES = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "NoNewPrivs", "Seccomp", "Cpus_all", "Mems_all")
"""Attributes that a process inherits, by the beginnings of their lines in /proc."""


class CannotFork(Exception):
    """The server has ended, or could never fork."""


class ForkServer:
    """The caller's side of a fork server.

    A thread starts the server and lives as long as it does, because Linux ties a child's parent-death signal to the
    thread that made it. The server ends when neither a job nor one of its ranks refers to this object any more.
    """

    def __init__(self, env: Mapping[str, str], surroundings: tuple[Any, ...], modules: Sequence[str]) -> None:
        self.env, self.surroundings = env, surroundings
        self.has_forked = False
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        weakref.finalize(self, self._control.close).atexit = False  # ranks may still have to end then
        with contextlib.ExitStack() as undo:
            fd = above_standard(theirs.detach(), undo)
            started: Future[subprocess.Popen[bytes]] = Future()
            life = (env, fd, modules, started)
            threading.Thread(target=_live, args=life, name="multicard-forkserver", daemon=True).start()
            self._process = started.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    def fork(self, env: Mapping[str, str], fds: Sequence[int], wait: Callable[[int], None]) -> Forked:
        """Fork a rank. ``env`` is its own part of its environment; ``wait(fd)`` returns once ``fd`` is readable.

        Raises:
            CannotFork: the rank must be started as a fresh process.
            OSError: no more processes or descriptors.
            the errors of ``wait``.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            status, tell = pipe(ours, theirs)
            folder = os.open(_folder(), os.O_PATH | os.O_DIRECTORY)
            theirs.callback(os.close, folder)
            self.ask({"env": dict(env)}, [tell, *fds, folder])
            theirs.close()
            wait(status)
            reply = _read(status)
            if "error" in reply:
                raise OSError(reply["errno"], reply["error"])
            ours.pop_all()
        self.has_forked = True
        return Forked(self, reply["pid"], status)

    def ask(self, request: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a request; a stopped server is continued."""
        with self._lock:
            try:
                self._process.send_signal(signal.SIGCONT)
                socket.send_fds(self._control, [json.dumps(request).encode()], list(fds), socket.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionError) as error:
                raise CannotFork from error


def _live(env: Mapping[str, str], fd: int, modules: Sequence[str], started: Future[subprocess.Popen[bytes]]) -> None:
    """The life of a server's thread. What the server would complain of, a rank that is started fresh says again."""
    try:
        process = _run("forkserver", env, [fd], subprocess.DEVNULL, subprocess.DEVNULL, *modules)
    except BaseException as error:
        started.set_exception(error)
    else:
        started.set_result(process)
        process.wait()


class Forked:
    """A rank that a server has forked. The server is its parent: only it can wait for the rank, which ends with it.

    Attributes:
        orphaned: whether it ended because the server did.
        server: the server's process id.
    """

    def __init__(self, server: ForkServer, pid: int, status: int) -> None:
        self.pid, self.server = pid, server.pid
        self.returncode: int | None = None
        self.orphaned = False
        self._server, self._status = server, status

    def wait(self) -> int:
        """The exit code, negative for a signal, of a rank that has ended or been killed."""
        if self.returncode is None:
            try:
                self._server.ask({"bury": self.pid})
                if not connection.wait([self._status], PATIENCE):
                    raise CannotFork
                self.returncode = _read(self._status)["code"]
            except CannotFork:  # then the kernel has killed the rank
                self.orphaned, self.returncode = True, -int(signal.SIGKILL)
            os.close(self._status)
        return self.returncode


_lock = threading.Lock()
_server: ForkServer | None = None  # one for this process, so that torch is imported once for all its jobs


def server(env: Mapping[str, str], modules: Sequence[str] = ()) -> ForkServer | None:
    """The server for ranks with environment ``env`` and further variables of their own; None: start fresh processes.

    If there is none yet, it is started, and imports torch and the ``modules`` while the caller continues.
    """
    global _server
    try:
        with _lock:
            found, now = _server, _surroundings()
            if found is None or (found.env, found.surroundings) != (env, now) or (found.ended and found.has_forked):
                found = _server = ForkServer(env, now, modules)
            return None if found.ended else found  # that it can't fork ranks, or died before it could
    except OSError:  # no /proc, or no more processes: a fresh start says so better
        return None


def start(
    env: Mapping[str, str], fds: Sequence[int], server: ForkServer | None, wait: Callable[[int], None]
) -> subprocess.Popen[bytes] | Forked:
    """A rank with the environment ``env``, from ``server`` if that can fork it; raises as :meth:`ForkServer.fork` does.

    ``fds`` are where it reads commands and writes reports, its standard output and error, and the job's store.
    """
    if server is not None and server.env.items() <= env.items():
        own = {name: value for name, value in env.items() if name not in server.env}
        with contextlib.suppress(CannotFork):
            return server.fork(own, fds, wait)
    commands, reports, stdout, stderr, store = fds
    return _run("rank", env, (commands, reports, store), stdout, stderr)


def _run(
    module: str, env: Mapping[str, str], fds: Sequence[int], stdout: int, stderr: int, *args: str
) -> subprocess.Popen[bytes]:
    """A fresh process that runs one of these modules, which inherits ``fds`` and is told their numbers."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", f"multicard.ranks.{module}", *map(str, (os.getpid(), *fds, *args))],
        env=env,
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd=_folder(),
        process_group=0,
    )


def _forget() -> None:
    """Called in a process that was forked from the caller, which keeps the server to itself."""
    global _server, _lock
    _server, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _surroundings() -> tuple[Any, ...]:
    """What a process inherits from the thread that starts it, besides environment and working folder."""
    status = pathlib.Path("/proc/thread-self/status").read_text().splitlines()
    limits, group = (pathlib.Path("/proc/self", name).read_text() for name in ("limits", "cgroup"))
    return [line for line in status if line.startswith(_ATTRIBUTES)], limits, group, os.nice(0)


def _read(status: int) -> dict[str, Any]:
    if not (text := os.read(status, 4096)):
        raise CannotFork
    return json.loads(text)


def _folder() -> str:
    """The caller's working folder; the root if it was deleted, since torch can't be imported without one."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "/"
    return "."
