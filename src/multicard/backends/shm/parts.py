"""All-to-all: every rank has a part for every other, in its exchange window or, if it doesn't fit, as a message."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from multicard.backends.shm.channel import Transfer
from multicard.backends.shm.messages import COLLECTIVE_TAG, Messages
from multicard.backends.shm.segment import PARTS, WINDOW
from multicard.backends.shm.sync import Sync
from multicard.backends.shm.window import Windows
from multicard.errors import MismatchError


class Parts:
    """The parts of one group's all-to-alls. Methods return the messages that are still under way.

    A rank announces where in its window the part for each other rank begins, and how many bytes it has. So ranks need
    not agree on whether parts are even, nor on which of them fit.

    Args:
        windows, messages: they carry the parts.
        sync: this rank's view of its group's progress.
    """

    def __init__(self, windows: Windows, messages: Messages, sync: Sync) -> None:
        self._views, self._messages, self._sync = windows.views, messages, sync
        self.rank, self.size = sync.rank, sync.size

    def swap(self, outs: Sequence[Tensor], ins: Sequence[Tensor]) -> list[Transfer]:
        """All ranks' ``ins`` by destination into ``outs`` by source, of any sizes and strides."""
        sync, half, at, left = self._sync, self._sync.sequence + 1 & 1, 0, []
        sync.await_readers()
        for to, part in enumerate(ins):
            size = part.numel() * part.itemsize
            here = to != self.rank and at + size <= WINDOW
            self._announce(to, at if here else None, size)
            if here:
                self._views(half, part.dtype, part.shape, at)[0][self.rank].copy_(part)
                at += size
            elif to != self.rank:
                left.append(Transfer(to, part, COLLECTIVE_TAG))
        sync.post()
        sends = self._messages.start(left)
        own, mine = ins[self.rank], outs[self.rank]
        mine.copy_(own if own.shape == mine.shape else own.reshape(mine.shape))
        sync.await_all()
        return sends + self._take(outs, [self._find(r, out.numel() * out.itemsize) for r, out in enumerate(outs)])

    def swap_even(self, out: Tensor, x: Tensor) -> list[Transfer]:
        """The same for equal parts of contiguous tensors that fit a window: one copy in, and one out."""
        sync, half, numel = self._sync, self._sync.sequence + 1 & 1, x.numel() // self.size
        size = numel * x.itemsize
        sync.await_readers()
        self._views(half, x.dtype, x.shape, 0)[0][self.rank].copy_(x)
        words, word = sync.words, self._word(self.rank, 0, sync.sequence + 1)
        for to in range(self.size):
            words[word], words[word + 1] = to * size + 1, size
            word += 2
        sync.post()
        sync.await_all()
        parts, at = out.view(self.size, numel), self.rank * size
        found = [self._find(source, size) for source in range(self.size)]
        if found.count(at) < self.size:  # for some other rank parts aren't even
            return self._take(parts.unbind(), found)
        parts.copy_(self._views(half, x.dtype, parts.shape[1:], at)[1])
        return []

    def _take(self, outs: Sequence[Tensor], found: Sequence[int | None]) -> list[Transfer]:
        """Copy the parts that are in windows; the others come as messages."""
        half, left = self._sync.sequence & 1, []
        for source, (out, at) in enumerate(zip(outs, found, strict=True)):
            if at is not None:
                out.copy_(self._views(half, out.dtype, out.shape, at)[0][source])
            elif source != self.rank:
                left.append(Transfer(source, out, COLLECTIVE_TAG, receives=True))
        return self._messages.start(left)

    def _announce(self, to: int, at: int | None, size: int) -> None:
        """Announce place in this rank's window (None: not there) and size of its part for ``to`` in the next step."""
        words, word = self._sync.words, self._word(self.rank, to, self._sync.sequence + 1)
        words[word], words[word + 1] = 0 if at is None else at + 1, size

    def _find(self, source: int, size: int) -> int | None:
        """The place of the part for this rank in the window of ``source``; ``size`` is the expected number of bytes."""
        sync = self._sync
        word = self._word(source, self.rank, sync.sequence)
        at, sent = sync.words[word], sync.words[word + 1]
        if sent != size:
            text = f"rank {sync.ranks[source]} sends {sent} bytes to rank {sync.ranks[self.rank]}, which takes {size}"
            raise sync.fail(sync.make_error(MismatchError, source, f"ranks disagree: {text}"))
        return at - 1 if at else None

    def _word(self, source: int, to: int, step: int) -> int:
        """The first of two words about ``source``'s part for ``to``."""
        return self._sync.rows[source] + PARTS + 2 * ((step & 1) * self.size + to)
