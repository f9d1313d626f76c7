"""The fork server: a child of the caller that has imported torch, runs nothing else, and forks ranks.

``multicard.ranks.starter`` is the caller's side. ``multiprocessing`` has a fork server too, but it listens on a socket
in the file system, is shared with the caller's own code, and its children outlive a caller that is killed.

A rank may be forked here because the server has no state that a fork breaks: no thread runs, no card is in use, no
random number was drawn. If this can't be guaranteed, the server ends, and ranks are started as fresh processes instead.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import signal
import socket
import sys

from multicard.ranks import rank
from multicard.ranks.family import adopt_orphans, kill_descendants, reap

NEEDED = ("multicard.mesh", "multicard.backends.shm")
"""What every rank imports, beside :mod:`multicard.ranks.rank`."""

LONGEST_REQUEST = 1 << 16
DESCRIPTORS = 7
"""That come with a request: pipes of status, commands, reports, output, errors; the store; the folder to work in."""


def main() -> None:
    parent, control, *modules = sys.argv[1:]
    rank.die_with_parent(int(parent))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a process that ignores it can't wait for children
    with socket.socket(fileno=int(control)) as channel:
        gc.disable()
        for module in [*NEEDED, *modules] if _is_for_cpus() else NEEDED:
            importlib.import_module(module)
        if not _may_fork():
            sys.exit("ranks can't be forked here")
        gc.freeze()  # imported objects are never garbage; scanning them would copy their memory in every rank
        gc.enable()
        rank.die_with_parent(int(parent), signal.SIGCONT)  # from here on it ends ranks and what they started first
        adopt_orphans()
        pipes = _serve(channel)
    rank.main(*pipes)  # in a rank: the server never gets here


def _is_for_cpus() -> bool:
    """Whether this torch supports no cards. Otherwise other libraries may look for cards, and open one, on import."""
    import torch

    return torch.accelerator.current_accelerator() is None


def _may_fork() -> bool:
    """Whether a rank that is forked here is as good as a fresh process.

    Libraries that start threads on import but support forking (OpenBLAS) stop them before a fork. So a thread that
    still runs after a fork forbids forking, and so does a card that is open or may be: torch imports its plugins.
    """
    if importlib.metadata.entry_points(group="torch.backends") or _opened() - {"/dev/null"}:
        return False
    if not (trial := os.fork()):
        os._exit(0)
    os.waitpid(trial, 0)
    return len(os.listdir("/proc/self/task")) == 1


def _opened() -> set[str]:
    """Devices that this process has open."""
    found = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    return {path for path in found if path.startswith("/dev/")}


def _serve(channel: socket.socket) -> tuple[int, int, int]:
    """Fork and bury ranks until the caller is gone. Returns in each new rank: its commands, reports and store."""
    server = os.getpid()
    statuses: dict[int, int] = {}  # of ranks that haven't been waited for, by process id
    while True:
        text, fds, _, _ = socket.recv_fds(channel, LONGEST_REQUEST, DESCRIPTORS)
        if not text:
            kill_descendants(server)
            os._exit(0)
        request = json.loads(text)
        if (pid := request.get("bury")) is not None:
            fds = [statuses.pop(pid)]
            _tell(fds[0], code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            reap(keep=statuses)
        elif len(fds) == DESCRIPTORS:  # else this process may have no more: the caller sees the closed status pipe
            pid = _fork(fds[0])
            if not pid:
                rank.die_with_parent(server)
                _close([fds[0], *statuses.values()])
                return _become_rank(request["env"], *fds[1:])
            if pid > 0:
                statuses[pid] = fds.pop(0)
        _close(fds)


def _fork(status: int) -> int:
    """The new rank's process id, 0 in the rank itself, -1 where there is none."""
    try:
        pid = os.fork()
    except OSError as error:
        _tell(status, errno=error.errno, error=error.strerror)
        return -1
    with contextlib.suppress(OSError):  # in both processes: whichever comes first
        os.setpgid(pid, pid)
    if pid and not _tell(status, pid=pid):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return -1
    return pid


def _become_rank(
    env: dict[str, str], commands: int, reports: int, stdout: int, stderr: int, store: int, folder: int
) -> tuple[int, int, int]:
    import torch

    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.fchdir(folder)
    _close([stdout, stderr, folder])
    os.environ.update(env)
    torch.default_generator.seed()  # so that no two processes draw the same; Python reseeds its own generator
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    return commands, reports, store


def _tell(status: int, **reply: object) -> bool:
    """Write to the caller; returns whether it still reads."""
    try:
        os.write(status, json.dumps(reply).encode())
    except BrokenPipeError:
        return False
    return True


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


if __name__ == "__main__":
    main()
