"""Point-to-point messages: one channel of pieces for every ordered pair of ranks.

A sender copies a message into free cells when it is sent, so that ``isend`` returns at once and the message is there
before the receiver asks (up to DEPTH · CELL bytes; the rest follows whenever either side waits for anything). There is
no thread: whoever waits moves its own messages along. A channel that has run empty starts at its first cell again, so
small messages stay in cache and memory is only used to the depth that a program needs.

Messages between two ranks match in order for each tag, as in MPI; one that comes before its receive, while another tag
is waited for, is kept aside.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from multicard.backends.shm_segment import CELL, DEPTH, ENTRY, POSTED, TABLE, TAKEN, Segment


@dataclasses.dataclass(eq=False)
class Transfer:
    """A message on its way. ``data`` are the bytes sent, or where those received go."""

    peer: int
    data: Tensor
    tag: int
    done: int = 0
    complete: bool = False


class Outbox:
    """What this rank sends to one other."""

    def __init__(self, segment: Segment, rank: int, peer: int, fence: Callable[[], None]) -> None:
        self._words, self._fence, self._cells = segment.words, fence, segment.cells[rank, peer].unbind()
        self._at = segment.channel(rank, peer)
        self._posted = 0
        self._cell = 0
        self.queue: collections.deque[Transfer] = collections.deque()

    def progress(self) -> None:
        """Move what fits."""
        while self.queue and self._step(self.queue[0]):
            self.queue.popleft().complete = True

    def _step(self, message: Transfer) -> bool:
        total = message.data.numel()
        while message.done < total or total == 0:
            flying = self._posted - self._words[self._at + TAKEN]
            if flying == DEPTH:
                return False
            self._fence()  # the receiver has read the cell that is written now
            self._cell = (self._cell + 1) % DEPTH if flying else 0
            piece = message.data[message.done : message.done + CELL] if total > CELL else message.data
            self._cells[self._cell][: piece.numel()].copy_(piece)
            entry = self._at + TABLE + self._posted % DEPTH * ENTRY
            self._words[entry], self._words[entry + 1], self._words[entry + 2] = self._cell, message.tag, total
            self._posted += 1
            self._fence()
            self._words[self._at + POSTED] = self._posted
            message.done += piece.numel()
            if total == 0:
                break
        return True


class Inbox:
    """What this rank receives from one other.

    Args:
        mismatch: raises for a message of another size than its receive's: ``(peer, bytes sent, bytes expected)``.
    """

    def __init__(
        self,
        segment: Segment,
        rank: int,
        peer: int,
        fence: Callable[[], None],
        mismatch: Callable[[int, int, int], None],
    ) -> None:
        self._words, self._fence, self._cells = segment.words, fence, segment.cells[peer, rank].unbind()
        self._at = segment.channel(peer, rank)
        self._mismatch, self._peer = mismatch, peer
        self._taken = 0
        self._current: Transfer | None = None
        self._early: dict[int, collections.deque[Transfer]] = {}
        self.queue: list[Transfer] = []

    def post(self, message: Transfer) -> None:
        """Receive into ``message``; at once if it has come before its time."""
        early = self._early.get(message.tag)
        if not early:
            self.queue.append(message)
            return
        came = early.popleft()
        if not early:
            del self._early[message.tag]
        if came is self._current:  # half of it
            self._check(message, came.data.numel())
            message.data[: came.done].copy_(came.data[: came.done])
            message.done, self._current = came.done, message
            self.queue.append(message)
        else:
            self._check(message, came.data.numel())
            message.data.copy_(came.data)
            message.complete = True

    def waiting(self, tag: int) -> bool:
        """Whether a message with this tag has come for which there is no receive yet."""
        if self._early.get(tag):
            return True
        if self.queue or self._current is not None or self._words[self._at + POSTED] == self._taken:
            return False
        self._fence()
        return bool(self._entry()[1] == tag)

    def progress(self) -> None:
        """Take what has come, while some receive is open."""
        while self.queue and self._words[self._at + POSTED] != self._taken:
            self._fence()  # the piece and its entry are there
            cell, tag, total = self._entry()
            message = self._current = self._current or self._start(tag, total)
            piece = message.data[message.done : message.done + CELL] if total > CELL else message.data
            piece.copy_(self._cells[cell][: piece.numel()])
            message.done += piece.numel()
            self._taken += 1
            self._fence()  # the cell has been read
            self._words[self._at + TAKEN] = self._taken
            if message.done == total:
                self._current = None
                message.complete = True
                if message in self.queue:
                    self.queue.remove(message)

    def _entry(self) -> list[int]:
        at = self._at + TABLE + self._taken % DEPTH * ENTRY
        return self._words[at : at + 3].tolist()

    def _start(self, tag: int, total: int) -> Transfer:
        for message in self.queue:
            if message.tag == tag:
                self._check(message, total)
                return message
        with torch.inference_mode(False):
            early = Transfer(self._peer, torch.empty(total, dtype=torch.uint8), tag)
        self._early.setdefault(tag, collections.deque()).append(early)
        return early

    def _check(self, message: Transfer, total: int) -> None:
        if message.data.numel() != total:
            self._mismatch(self._peer, total, message.data.numel())
