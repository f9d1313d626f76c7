"""A rank's messages to and from every other: queues that move whenever its thread waits for anything."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from multicard.backends.shm.channel import Inbox, Outbox, Transfer
from multicard.backends.shm.segment import Segment
from multicard.backends.shm.sync import Sync, guarded
from multicard.errors import MismatchError

COLLECTIVE_TAG = (1 << 63) - 1  # all_to_all's messages; a program's own tags are 32-bit
POLLS = 30  # checks of a message before a proper wait for it


class Messages:
    """Point-to-point messages of one rank of a group: its channels to and from every other."""

    def __init__(self, segment: Segment, sync: Sync) -> None:
        self.sync = sync
        others = [rank for rank in range(len(sync.ranks)) if rank != sync.rank]
        self._outboxes = {r: Outbox(segment, sync.rank, r, sync.fence) for r in others}
        self._inboxes = {r: Inbox(segment, sync.rank, r, sync.fence, self._wrong_size) for r in others}
        self._boxes: tuple[Outbox | Inbox, ...] = (*self._outboxes.values(), *self._inboxes.values())

    def start(self, transfers: list[Transfer]) -> list[Transfer]:
        """Send the messages that fit, receive those that have arrived, and leave the rest to the next wait."""
        boxes = []
        for transfer in transfers:
            boxes.append(self._box(transfer))
            boxes[-1].post(transfer)
        while sum(box.progress() for box in boxes if box.queue):  # all of them, in turn
            pass
        if not all(transfer.complete for transfer in transfers):
            pending.groups.add(self)
        return transfers

    def progress(self) -> bool:
        """Move messages as far as possible without waiting; returns whether any moved."""
        if self.sync.error is not None:
            pending.groups.discard(self)
            return False
        moved = sum(box.progress() for box in self._boxes if box.queue)
        if not any(box.queue for box in self._boxes):
            pending.groups.discard(self)
        return moved > 0

    @guarded
    def drive(self, transfers: Sequence[Transfer]) -> None:
        """Wait until these messages have arrived."""
        late = [transfer for transfer in transfers if not transfer.complete]
        for _ in range(POLLS):
            if not late:
                return
            if self.sync.error is not None:
                raise self.sync.again()
            for transfer in late:
                self._box(transfer).progress()
            late = [transfer for transfer in late if not transfer.complete]
        if late:
            pending.groups.add(self)
            self.sync.wait(lambda: sorted({t.peer for t in late if not t.complete}), _name(late[0]))

    def wait_for_any(self, tag: int) -> int:
        """Wait until a message with this tag has arrived from any rank; returns which rank."""
        found: list[int] = []

        def missing() -> list[int]:
            found.extend(rank for rank, inbox in self._inboxes.items() if inbox.waiting(tag))
            return [] if found else list(self._inboxes)

        self.sync.wait(missing)
        return found[0]

    def _box(self, transfer: Transfer) -> Outbox | Inbox:
        return (self._inboxes if transfer.receives else self._outboxes)[transfer.peer]

    def _wrong_size(self, peer: int, sent: int, expected: int) -> None:
        what = f"rank {self.sync.ranks[peer]} sends {sent} bytes where {expected} are expected"
        raise self.sync.fail(self.sync.make_error(MismatchError, peer, what))


class _Pending(threading.local):
    """The groups in which this thread has messages under way.

    While a rank waits in one group, a peer may wait for its message in another. So this list belongs to the thread, not
    to a group. It holds no settings, and is empty once all messages have arrived.
    """

    def __init__(self) -> None:
        self.groups: weakref.WeakSet[Messages] = weakref.WeakSet()


pending = _Pending()


def progress_all() -> bool:
    """Move all of this thread's messages; returns whether any moved."""
    return bool(sum(group.progress() for group in tuple(pending.groups)))


def _name(transfer: Transfer) -> str:
    if transfer.tag == COLLECTIVE_TAG:
        return ""
    return f"{'recv' if transfer.receives else 'send'}({transfer.nbytes} bytes)"
