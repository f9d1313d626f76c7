"""How ranks wait for one another: flags, fences, and waits that end.

**Flags.** Every rank has one word that it alone writes: ``sequence << 24 | call``. The sequence number counts the steps
that the rank has posted in this group; posting step s says that the rank has finished reading what others wrote in step
s-1, and that what it writes itself in step s is there. ``call`` is a hash of the collective and its arguments, so ranks
that are in different collectives find out at their first step instead of exchanging garbage.

**Fences.** A flag must not be seen before the data that it announces, nor data be read (or overwritten) before the flag
that allows it. x86 keeps stores in order and loads in order; Arm, POWER and RISC-V don't, and plain moves from Python
promise nothing. :meth:`Sync.fence` releases and re-acquires a lock that nobody else ever takes. Whatever came before
the release is complete before the lock reads as free, and nothing after the acquire starts before it has read the lock
as free, so nothing crosses the pair in either direction. In terms of processors: CPython's locks are semaphores or
compare-and-swaps, hence a store-release followed by a load-acquire of the same word, which Armv8 keeps in order (STLR
before LDAR) and POWER and RISC-V get from the barrier in the release. POSIX (XBD 4.12) lists the calls among those
that synchronize memory. The fence stands between data and flag on the writer's side (release) and between flag and
data on the reader's (acquire). Copies made by torch's own threads are ordered before it by the join that ends a
parallel region.

**Waits** spin, then yield the core, then sleep, at most a millisecond at first and five later. While not spinning they
move this thread's other messages along (so two ranks that wait for one another's messages in different groups both go
on), let Python handle signals (Ctrl-C), see within a fraction of a second that a peer is dead or has given up, and end
at the timeout.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

from multicard.backends.shm_segment import CALL, CALL_WORDS, FAILED, FLAG, Process, Segment
from multicard.errors import CollectiveTimeout, MismatchError, RankError

CALL_BITS = 24
CALL_MASK = (1 << CALL_BITS) - 1
LOOK = 0.05  # seconds between looks at whether peers live
YIELDING = 0.001  # seconds that a wait yields before it sleeps
REASONS: tuple[type[RankError], ...] = (RankError, CollectiveTimeout, MismatchError)

Missing = Callable[[], Sequence[int]]


class Sync:
    """One rank's view of its group's progress.

    Args:
        segment: the group's memory.
        rank: this rank within the group.
        peers: every rank's process, by rank within the group.
        ranks: every rank's global rank, for messages.
        timeout: seconds that one wait may last.
        progress: moves this thread's point-to-point messages along.
        describe: names a collective from its description's words.
    """

    def __init__(
        self,
        segment: Segment,
        rank: int,
        peers: Sequence[Process],
        ranks: Sequence[int],
        timeout: float,
        progress: Callable[[], None],
        describe: Callable[[Sequence[int]], str],
    ) -> None:
        self.words, self.rank, self.ranks, self.timeout = segment.words, rank, ranks, timeout
        self.size = len(ranks)
        self._peers, self._progress, self._describe = peers, progress, describe
        self._rows = [segment.row(r) for r in range(self.size)]
        self._row = self._rows[rank]
        self._others = [(r, row + FLAG) for r, row in enumerate(self._rows) if r != rank]
        crowded = self.size > len(os.sched_getaffinity(0))
        self._spins = 20 if crowded else 2000  # about a microsecond, or a hundred of them
        self.sequence = 0  # steps posted
        self.settled = 0  # every peer is known to have posted this step
        self.calls = 0
        self._call = 0
        self._words: tuple[int, ...] = ()
        self.error: RankError | None = None
        lock = threading.Lock()
        lock.acquire()
        self._release, self._acquire = lock.release, lock.acquire

    def fence(self) -> None:
        """Nothing crosses this, in either direction; see the module's text."""
        self._release()
        self._acquire()

    # ---- steps

    def enter(self, *call: int) -> None:
        """Begin a collective: tell the others which, by at most CALL_WORDS numbers that all of them give alike.

        Raises:
            RankError: the group has failed before.
        """
        if self.error is not None:
            raise self.again()
        self.calls += 1
        self._words = call
        self._call = hash(call) & CALL_MASK  # a tuple of integers hashes alike in every process
        at = self._row + CALL + (self.sequence + 1 & 1) * CALL_WORDS
        for word in call:
            self.words[at] = word
            at += 1

    def may_write(self) -> None:
        """Wait until nobody reads what this rank wrote two steps ago: that half of its window is free again."""
        if self.settled < self.sequence:
            self._wait_for_flags(self.sequence << CALL_BITS, [r for r, _ in self._others])
            self.fence()
            self.settled = self.sequence

    def post(self) -> None:
        """Say that this rank's part of the next step is written, and that it has read everything of the last."""
        self.sequence += 1
        self._release()
        self._acquire()
        self.words[self._row] = self.sequence << CALL_BITS | self._call

    def await_all(self) -> None:
        """Wait until every rank has posted this step."""
        mine = self.sequence << CALL_BITS | self._call
        floor = mine & ~CALL_MASK
        words, spins = self.words, self._spins
        for rank, flag in self._others:
            while words[flag] < floor:
                spins -= 1
                if spins < 0:
                    self._wait_for_flags(floor, [r for r, _ in self._others])
                    break
            if 0 < words[flag] ^ mine <= CALL_MASK:  # one that is further has seen that we agree
                raise self.fail(self._mismatch(rank))
        self._release()
        self._acquire()
        self.settled = self.sequence

    def await_one(self, rank: int) -> None:
        """Wait until ``rank`` has posted this step."""
        mine = self.sequence << CALL_BITS | self._call
        flag = self._rows[rank] + FLAG
        spins = self._spins
        while self.words[flag] < mine & ~CALL_MASK:
            spins -= 1
            if spins < 0:
                self._wait_for_flags(mine & ~CALL_MASK, [rank])
        if 0 < self.words[flag] ^ mine <= CALL_MASK:
            raise self.fail(self._mismatch(rank))
        self.fence()

    def _wait_for_flags(self, floor: int, ranks: Sequence[int]) -> None:
        words, rows = self.words, self._rows
        self.wait(lambda: [r for r in ranks if words[rows[r] + FLAG] < floor])

    def _mismatch(self, rank: int) -> RankError:
        """Ranks that agree on every step so far part at a call's first step, so its words lie by that step's parity."""
        self.fence()
        at = self._rows[rank] + CALL + (self.sequence & 1) * CALL_WORDS
        theirs = self._describe(self.words[at : at + CALL_WORDS].tolist())
        return self.make_error(
            MismatchError, rank, f"rank {self.ranks[rank]} is in {theirs}: ranks must make the same calls"
        )

    # ---- waits

    def wait(self, missing: Missing) -> None:
        """Return once ``missing()``, the ranks (within the group) still waited for, is empty.

        Raises:
            RankError: one of them is dead or has given up.
            CollectiveTimeout: some did not come in time.
        """
        start = looked = time.monotonic()
        pause = 50e-6
        while ranks := missing():
            self._progress()
            now = time.monotonic()
            if now - start < YIELDING:
                os.sched_yield()
                continue
            if now - looked > LOOK:
                looked = now
                self._look_at(ranks, missing)
            if now - start > self.timeout:
                raise self.fail(self._late(ranks))
            time.sleep(pause)
            pause = min(pause * 1.2, 1e-3 if now - start < 1 else 5e-3)

    def _look_at(self, ranks: Sequence[int], missing: Missing) -> None:
        for rank in ranks:
            failed = self.words[self._rows[rank] + FAILED]
            if not failed and self._peers[rank].alive:
                continue
            if rank not in missing():  # it came, and left, while we looked
                continue
            raise self.fail(self._gone(rank, failed))

    def _gone(self, rank: int, failed: int) -> RankError:
        who = self.ranks[rank]
        if not failed:
            return self.make_error(RankError, rank, f"rank {who} (process {self._peers[rank].pid}) died")
        kind, culprit = REASONS[failed >> 32], (failed & 0xFFFFFFFF) - 1
        why = "left the group" if culprit == rank else f"gave up because of rank {self.ranks[culprit]}"
        return self.make_error(kind, culprit, f"rank {who} {why}")

    def _late(self, ranks: Sequence[int]) -> RankError:
        names = ", ".join(str(self.ranks[r]) for r in ranks)
        late = f"rank{'s' if len(ranks) > 1 else ''} {names} did not arrive within {self.timeout:g} s"
        return self.make_error(CollectiveTimeout, ranks[0], late)

    # ---- failure

    def make_error(self, kind: type[RankError], culprit: int, what: str) -> RankError:
        name = self._describe(self._words)
        return kind(
            f"{what}; rank {self.ranks[self.rank]} was in {name}, call {self.calls} of its group",
            rank=self.ranks[culprit],
            collective=name.partition("(")[0],
            sequence_number=self.calls,
        )

    def fail(self, error: RankError) -> RankError:
        """Mark this rank as out of the group, so that nobody waits for it, and give the error back to raise."""
        if self.error is None:
            self.error = error
            culprit = self.ranks.index(error.rank) if error.rank in self.ranks else self.rank
            self.words[self._row + FAILED] = REASONS.index(type(error)) << 32 | culprit + 1
        return error

    def again(self) -> RankError:
        """The error of a group that has failed before."""
        assert self.error is not None
        return type(self.error)(f"this group has failed before: {self.error}", rank=self.error.rank)

    def leave(self, why: str) -> None:
        """This rank takes no further part."""
        rank = self.ranks[self.rank]
        self.fail(RankError(f"rank {rank} {why}", rank=rank))
