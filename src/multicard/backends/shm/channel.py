"""Point-to-point messages: one channel of pieces for every ordered pair of ranks.

A sender copies a message into free cells when it is sent, so ``isend`` returns at once and the message is available
before the receive is called (up to DEPTH · CELL bytes; the rest follows whenever either side waits for anything). There
is no background thread: a waiting rank moves its own messages. The lowest free cell is used, so short messages, and
long ones with a receiver that keeps up, stay in cache, and memory is used only to the depth that a program needs.

Messages between two ranks match in order for each tag, as in MPI. A message that arrives before its receive, while
another tag is awaited, is stored separately.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from multicard.backends.shm.segment import CELL, DEPTH, ENTRY, POSTED, TABLE, TAKEN, Segment
from multicard.backends.shm.tensor import VIEWS, Flat, check_writable, plain

BURST = 2
"""Cells that one end moves in a row: if both ranks send and receive, cells are then taken while they are in cache."""


class Transfer:
    """A message under way: a tensor to send, or to receive into.

    A tensor that fits a cell is copied directly, whatever its strides; a longer one as bytes in one dimension.
    """

    __slots__ = ("_flat", "bytes", "complete", "done", "long", "nbytes", "peer", "receives", "tag", "tensor")

    def __init__(self, peer: int, tensor: Tensor, tag: int, *, receives: bool = False) -> None:
        self.peer, self.tag, self.nbytes = peer, tag, tensor.numel() * tensor.itemsize
        self.tensor, self.receives = plain(tensor), receives
        self.done, self.complete, self.long = 0, False, self.nbytes > CELL
        if self.long:
            self._flat = Flat(self.tensor, write=receives)
            self.bytes = self._flat.flat.view(torch.uint8)
        elif receives:
            check_writable(tensor)

    def finish(self) -> None:
        """Called once all of the message has been copied."""
        if self.long:
            self._flat.finish()
        self.complete = True

    def take(self, other: Transfer) -> None:
        """Continue a message that was received as bytes before this receive was called."""
        if other.complete:
            self.tensor.copy_(other.tensor.view(self.tensor.dtype).view(self.tensor.shape))
            self.complete = True
        else:
            self.bytes[: other.done].copy_(other.tensor[: other.done])
            self.done = other.done


class _Channel:
    """The common part of a channel's two ends."""

    def __init__(self, segment: Segment, source: int, to: int, fence: Callable[[], None]) -> None:
        self.words, self.fence, self.at = segment.words, fence, segment.channel(source, to)
        self.cells = segment.cells[source, to].unbind()
        self.view = functools.lru_cache(VIEWS)(self._view)
        self.count = 0  # pieces that this end has moved

    def _view(self, cell: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """The start of a cell as a tensor."""
        with torch.inference_mode(False):  # a view made in inference mode could not be written outside
            return self.cells[cell][: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    @property
    def entry(self) -> int:
        """The first word of the next piece's entry: its cell, its message's tag and number of bytes."""
        return self.at + TABLE + self.count % DEPTH * ENTRY


class Outbox(_Channel):
    """Messages from this rank to one other."""

    def __init__(self, segment: Segment, rank: int, peer: int, fence: Callable[[], None]) -> None:
        super().__init__(segment, rank, peer, fence)
        self._free = (1 << DEPTH) - 1  # a bit for every free cell
        self._flying: collections.deque[int] = collections.deque()  # posted cells that the receiver may not have taken
        self.queue: collections.deque[Transfer] = collections.deque()

    def post(self, message: Transfer) -> None:
        """Send ``message`` after those that are under way."""
        self.queue.append(message)

    def progress(self) -> bool:
        """Send a burst of pieces that fit; returns whether any was sent."""
        queue, words = self.queue, self.words
        for burst in range(BURST):
            cell = self._take_cell() if queue else None
            if cell is None:
                return burst > 0
            message = queue[0]
            self._write(message, cell)
            entry = self.entry
            words[entry], words[entry + 1], words[entry + 2] = cell, message.tag, message.nbytes
            self.count += 1
            self.fence()  # cell and entry are written
            words[self.at + POSTED] = self.count
            if message.done == message.nbytes:
                queue.popleft()
                message.complete = True
        return True

    def _take_cell(self) -> int | None:
        """The lowest free cell: this touches the least memory, and the cell is the likeliest to be in cache."""
        flying = self._flying
        for _ in range(len(flying) - (self.count - self.words[self.at + TAKEN])):
            self._free |= 1 << flying.popleft()
        lowest = self._free & -self._free
        if not lowest:
            return None
        self.fence()  # the receiver has read the cell that will be written
        self._free ^= lowest
        cell = lowest.bit_length() - 1
        flying.append(cell)
        return cell

    def _write(self, message: Transfer, cell: int) -> None:
        tensor = message.tensor
        if not message.long:
            self.view(cell, tensor.dtype, tensor.shape).copy_(tensor)
            message.done = message.nbytes
            return
        piece = message.bytes[message.done : message.done + CELL]
        self.cells[cell][: piece.numel()].copy_(piece)
        message.done += piece.numel()


class Inbox(_Channel):
    """Messages to this rank from one other.

    Args:
        mismatch: ``(peer, bytes sent, bytes expected)``: raises for a message with another size than its receive.
    """

    def __init__(
        self,
        segment: Segment,
        rank: int,
        peer: int,
        fence: Callable[[], None],
        mismatch: Callable[[int, int, int], None],
    ) -> None:
        super().__init__(segment, peer, rank, fence)
        self._mismatch, self._peer = mismatch, peer
        self._current: Transfer | None = None
        self._early: dict[int, collections.deque[Transfer]] = {}
        self.queue: list[Transfer] = []

    def post(self, message: Transfer) -> None:
        """Receive into ``message``, which may already be arriving."""
        early = self._early.get(message.tag)
        if not early:
            self.queue.append(message)
            return
        came = early[0]
        self._check(message, came.nbytes)
        message.take(came)
        if came is self._current:
            self._current = message
            self.queue.append(message)
        early.popleft()

    def waiting(self, tag: int) -> bool:
        """Whether a message with this tag has arrived that has no receive yet."""
        if self._early.get(tag):
            return True
        if self.queue or self._current is not None or self.words[self.at + POSTED] == self.count:
            return False
        self.fence()
        return self.words[self.entry + 1] == tag

    def progress(self) -> bool:
        """Take a burst of arrived pieces while any receive is open; returns whether any was taken."""
        queue, words = self.queue, self.words
        for burst in range(BURST):
            if not queue or words[self.at + POSTED] == self.count:
                return burst > 0
            self.fence()  # cell and entry are there
            entry = self.entry
            message = self._current or self._start(words[entry + 1], words[entry + 2])
            self._read(message, words[entry])
            self.count += 1
            self.fence()  # the cell has been read
            words[self.at + TAKEN] = self.count
            self._current = message
            if message.done == message.nbytes:
                self._current = None
                message.finish()
                if message in queue:
                    queue.remove(message)
        return True

    def _read(self, message: Transfer, cell: int) -> None:
        tensor = message.tensor
        if not message.long:
            tensor.copy_(self.view(cell, tensor.dtype, tensor.shape))
            message.done = message.nbytes
            return
        piece = message.bytes[message.done : message.done + CELL]
        piece.copy_(self.cells[cell][: piece.numel()])
        message.done += piece.numel()

    def _start(self, tag: int, total: int) -> Transfer:
        for message in self.queue:
            if message.tag == tag:
                self._check(message, total)
                return message
        with torch.inference_mode(False):
            early = Transfer(self._peer, torch.empty(total, dtype=torch.uint8), tag, receives=True)
        self._early.setdefault(tag, collections.deque()).append(early)
        return early

    def _check(self, message: Transfer, total: int) -> None:
        if message.nbytes != total:
            self._mismatch(self._peer, total, message.nbytes)
