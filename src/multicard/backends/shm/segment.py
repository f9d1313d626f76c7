"""The memory that the ranks of one group share, and who those ranks are.

One file in memory (:mod:`multicard.memory`) a group. It has no name, so no other user can open it, nothing is left in
``/dev/shm`` however the ranks die, and a container's small ``/dev/shm`` doesn't limit it. Rank 0 makes it; the others
open it through ``/proc/PID/fd/N``, which the kernel allows for processes of the same user. Pages are allocated when
they are first touched, so a group that never communicates costs nothing.

Layout, each part on its own cache lines:

    rows      one a rank: its flag, its process, whether it has failed, its current call
    channels  one an ordered pair: pieces posted, pieces taken, a table of the pieces in flight
    windows   two a rank, WINDOW bytes: collectives write them for all ranks to read
    cells     DEPTH a channel, CELL bytes: they carry point-to-point messages
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
import secrets
import time
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.errors import CollectiveTimeout, RankError, UnsupportedError
from multicard.memory import check_proc, memory_file

WORD = 8
LINE = 128  # bytes: two lines of 64, which x86 prefetches together
PAGE = 4096
WINDOW = 1 << 20
CELL = 1 << 18
DEPTH = 32

# a row: the flag, alone on its line; the rank's process id, how it failed, which rank it waits for, and its calls in
# even and odd steps; then the place of each rank's part in its window, for even and odd steps
PID, FAILED, WAITING, CALL = (LINE // WORD + i for i in (0, 1, 2, 4))
PARTS = 2 * LINE // WORD
POSTED, TAKEN, TABLE = 0, LINE // WORD, 2 * LINE // WORD  # a channel's words
ENTRY = 4
CHANNEL = TABLE + DEPTH * ENTRY
NONCE = 0
ROWS = LINE // WORD

HANDSHAKE = re.compile(rb"(\S+) (\d+) (\d+) (-?\d+) (\d+)")  # place, pid, start time, descriptor, nonce


@dataclasses.dataclass(frozen=True)
class Process:
    """A process by pid and start time, which together are unique."""

    pid: int
    start: int

    @classmethod
    def current(cls) -> Process:
        return cls(os.getpid(), start_time(os.getpid()) or 0)

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.start

    @property
    def stopped(self) -> bool:
        """Whether it is stopped (SIGSTOP, a debugger)."""
        fields = _stat(self.pid)
        return bool(fields) and fields[0] in b"Tt"


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie."""
    fields = _stat(pid)
    return None if not fields or fields[0] in b"ZX" else int(fields[19])


def _stat(pid: int) -> list[bytes]:
    """The fields of ``/proc/PID/stat`` from the state on (proc(5)); empty if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _place() -> str:
    """What ranks must have in common to share memory: the running kernel and the pid namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"


class Handshake:
    """What every rank puts in the store when its group is made, and reads from the others at its first communication.

    Making a group is cheap and never waits; unused groups map nothing. A rank alone in its group uses no store.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: Sequence[int]) -> None:
        self.store, self.rank, self.ranks, self.fd = store, rank, tuple(ranks), -1
        if len(ranks) == 1:
            return
        check_proc()
        nonce = 0
        if rank == 0:
            self.fd = memory_file("multicard")
            self._close = weakref.finalize(self, os.close, self.fd)
            os.ftruncate(self.fd, segment_bytes(len(ranks)))
            nonce = secrets.randbits(63) | 1
            os.pwrite(self.fd, nonce.to_bytes(WORD, "little"), NONCE * WORD)
        me = Process.current()
        store.set(str(rank), f"{_place()} {me.pid} {me.start} {self.fd} {nonce}")

    def complete(self, timeout: float) -> tuple[Segment, list[Process]]:
        """Map the segment and learn the peers' processes. Waits until every rank has made its group.

        Raises:
            CollectiveTimeout: a rank didn't make its group in time.
            RankError: a rank died, or the store has something else in place of its handshake.
            UnsupportedError: ranks that can't share memory.
        """
        if len(self.ranks) == 1:
            return Segment(-1, 1), []
        deadline = time.monotonic() + timeout
        peers = [self._read(rank, deadline) for rank in range(len(self.ranks))]
        while True:
            segment = self._open(*self._read(0, deadline))
            if segment is not None:
                break
            # The store's entry is from an earlier group of this name, of this or a dead process: its rank 0 is late.
            self._wait(0, deadline)
        me = Process.current()
        segment.words[segment.row(self.rank) + PID] = me.pid
        return segment, [peer for peer, _, _ in peers]

    def _read(self, rank: int, deadline: float) -> tuple[Process, int, int]:
        while not self.store.check([str(rank)]):
            self._wait(rank, deadline)
        said = self.store.get(str(rank))
        whole = HANDSHAKE.fullmatch(said)
        if whole is None:  # a RankError counts as a consequence, so it doesn't hide what ended that rank
            raise RankError(
                f"rank {self.ranks[rank]} is gone, or was never in this group: the store has {said!r} where its "
                "handshake should be; start the ranks again, with a store that no other job uses",
                rank=self.ranks[rank],
            )
        place, *numbers = whole.groups()
        pid, start, fd, nonce = map(int, numbers)
        if place.decode() != _place():
            raise UnsupportedError(
                f"rank {self.ranks[rank]} is on another host or in another pid namespace than rank "
                f"{self.ranks[self.rank]}: shm can't reach it; use backend='gloo'"
            )
        return Process(pid, start), fd, nonce

    def _wait(self, rank: int, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise CollectiveTimeout(
                f"rank {self.ranks[rank]} did not make its process group in time", rank=self.ranks[rank]
            )
        time.sleep(0.001)

    def _open(self, owner: Process, fd: int, nonce: int) -> Segment | None:
        """Rank 0's file, or None if it isn't the one of this group."""
        if self.rank == 0:
            return Segment(self.fd, len(self.ranks))
        try:
            opened = os.open(f"/proc/{owner.pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if not owner.alive:
                raise RankError(f"rank {self.ranks[0]} died before the group's first use", rank=self.ranks[0]) from None
            return None
        except PermissionError as error:
            raise UnsupportedError(
                f"rank {self.ranks[self.rank]} may not open rank {self.ranks[0]}'s memory ({error}): "
                "shm needs ranks of one user; use backend='gloo'"
            ) from error
        try:
            file = os.fstat(opened)
            if file.st_uid != os.geteuid():  # another user of this host has written to a launcher's store
                raise RankError(
                    f"the store was tampered with: what it calls rank {self.ranks[0]}'s memory (process {owner.pid}) "
                    f"belongs to user {file.st_uid}",
                    rank=self.ranks[0],
                )
            if file.st_size != segment_bytes(len(self.ranks)):
                return None
            segment = Segment(opened, len(self.ranks))
        finally:
            os.close(opened)
        used = segment.words[segment.row(self.rank) + PID] != 0
        return None if used or segment.words[NONCE] != nonce else segment

    def withdraw(self) -> None:
        """Close rank 0's descriptor: the memory lives on in the ranks that have mapped it."""
        if self.fd >= 0:
            self._close()


def _row_words(size: int) -> int:
    line = LINE // WORD
    return PARTS + -(-4 * size // line) * line


def _header_words(size: int) -> int:
    return ROWS + size * _row_words(size) + size * size * CHANNEL


def _windows_at(size: int) -> int:
    return -(-_header_words(size) * WORD // PAGE) * PAGE


def _cells_at(size: int) -> int:
    return _windows_at(size) + 2 * size * WINDOW


def segment_bytes(size: int) -> int:
    """Address space of a group of ``size`` ranks. Memory is only used once it has been written."""
    return _cells_at(size) + size * size * DEPTH * CELL


class Segment:
    """The mapped memory.

    Attributes:
        words: rows and channels as 64-bit words. An aligned word is read and written atomically in every build of
            CPython (``memoryview`` copies a word of 8 bytes), so it is never seen half written.
        windows: ``(2, ranks, WINDOW)`` bytes.
        cells: ``(from, to, DEPTH, CELL)`` bytes.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Map ``fd``; if it is -1, memory of this process alone."""
        memory = mmap.mmap(fd, segment_bytes(size))
        self.words = memoryview(memory)[: _header_words(size) * WORD].cast("Q")
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        windows, cells = _windows_at(size), _cells_at(size)
        self.windows: Tensor = whole[windows:cells].view(2, size, WINDOW)
        self.cells: Tensor = whole[cells:].view(size, size, DEPTH, CELL)
        self.size = size

    def row(self, rank: int) -> int:
        """The first word of a rank's row."""
        return ROWS + rank * _row_words(self.size)

    def channel(self, source: int, to: int) -> int:
        """The first word of a channel."""
        return self.row(self.size) + (source * self.size + to) * CHANNEL
