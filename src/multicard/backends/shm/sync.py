"""How ranks wait for one another: flags, fences, and waits with a limit.

**Flags.** Every rank has one word that only it writes: ``sequence << 24 | call``. The sequence number counts the steps
that the rank has posted in this group. Posting step s means that the rank has read everything that others wrote in step
s-1, and has written its own data of step s. ``call`` is a hash of the collective and its arguments, so ranks that are
in different collectives notice at their first step instead of exchanging garbage.

**Fences.** A flag must not be seen before the data that it announces, and data must not be read (or overwritten) before
the flag that allows it. x86 keeps stores in order and loads in order; Arm, POWER and RISC-V don't, and plain moves from
Python guarantee nothing. :meth:`Sync.fence` releases and re-acquires a lock that no other code takes. Everything before
the release is complete before the lock reads as free, and nothing after the acquire starts before it has read the lock
as free, so no access moves across the pair in either direction. On the processor, CPython's locks are semaphores or
compare-and-swaps, hence a store-release followed by a load-acquire of the same word, which Armv8 keeps in order (STLR
before LDAR) and POWER and RISC-V get from the barrier in the release. POSIX (XBD 4.12) lists the calls among those
that synchronize memory. The fence stands between data and flag on the writer's side (release) and between flag and
data on the reader's (acquire). Copies made by torch's own threads are ordered before it by the join that ends a
parallel region.

**Waits** spin, then yield the core, then sleep, for at most a millisecond at first and five later. While not spinning
they move this thread's other messages (so two ranks that wait for one another's messages in different groups both
continue), let Python handle signals (Ctrl-C), notice within a fraction of a second that a peer is dead or has failed,
and end at the timeout.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from multicard.backends.calls import CALL_WORDS, Call, describe
from multicard.backends.shm.segment import CALL, FAILED, WAITING, Process, Segment
from multicard.errors import CollectiveTimeout, MismatchError, MulticardError, RankError

CALL_BITS = 24
CALL_MASK = (1 << CALL_BITS) - 1
LOOK = 0.05  # seconds between checks that peers are alive
YIELDING = 0.001  # seconds that a wait yields before it sleeps
REASONS: tuple[type[RankError], ...] = (RankError, CollectiveTimeout, MismatchError)

Missing = Callable[[], Sequence[int]]
Args = ParamSpec("Args")
T = TypeVar("T")


def guarded(call: Callable[Args, T]) -> Callable[Args, T]:
    """For methods of objects with a ``sync`` (None: not yet, or no longer).

    An exception that interrupts a call (also Ctrl-C) ends this rank's part in the group, and the others notice.
    """

    @functools.wraps(call)
    def guard(*args: Args.args, **kwargs: Args.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except MulticardError:
            raise
        except BaseException as error:
            sync: Sync | None = args[0].sync  # type: ignore[attr-defined]
            if sync is not None:
                sync.leave(f"was stopped by {type(error).__name__} in {call.__name__}")
            raise

    return guard


class Sync:
    """One rank's view of its group's progress.

    Args:
        segment: the group's memory.
        rank: this rank within the group.
        peers: every rank's process, by rank within the group.
        ranks: every rank's global rank, for messages.
        timeout: seconds that one wait may last without any progress.
        progress: moves this thread's messages; returns whether any moved.
    """

    def __init__(
        self,
        segment: Segment,
        rank: int,
        peers: Sequence[Process],
        ranks: Sequence[int],
        timeout: float,
        progress: Callable[[], bool],
    ) -> None:
        self.words = segment.words
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self.size = len(ranks)
        self._peers, self._progress = peers, progress
        self.rows = [segment.row(r) for r in range(self.size)]
        self._row = self.rows[rank]
        self._others = [(r, row) for r, row in enumerate(self.rows) if r != rank]
        processes = dist.get_world_size() if dist.is_initialized() else self.size
        crowded = processes > len(os.sched_getaffinity(0))
        self._spins = 20 if crowded else 2000  # about a microsecond, or a hundred of them
        self.sequence = 0  # steps posted
        self._seen = 0  # every peer is known to have posted this step
        self.calls = 0
        self._call = self._posted = 0
        self._words: Call = (0, 0, 0, 0)
        self.error: RankError | None = None
        lock = threading.Lock()
        lock.acquire()
        self._release, self._acquire = lock.release, lock.acquire

    def fence(self) -> None:
        """No memory access moves across this, in either direction; see the module's docstring."""
        self._release()
        self._acquire()

    # ---- steps

    def enter(self, call: Call) -> None:
        """Begin a collective, and write for the others which one it is.

        Raises:
            RankError: the group has failed before.
        """
        if self.error is not None:
            raise self.again()
        self.calls += 1
        self._words = call
        self._call = hash(call) & CALL_MASK  # a tuple of integers has the same hash in every process
        at = self._row + CALL + (self.sequence + 1 & 1) * CALL_WORDS
        for word in call:
            self.words[at] = word
            at += 1

    @contextlib.contextmanager
    def compare(self) -> Iterator[None]:
        """Steps in this context have the same ``call`` in all collectives, so ranks in different ones can compare."""
        call, self._call = self._call, 0
        yield
        self._call = call

    def await_readers(self) -> None:
        """Wait until all ranks have posted this rank's latest step, and so have read its data of the step before.

        Comes before every write and every post. So a rank is never more than one step ahead of another, and the rank
        ahead has seen that both agreed on the previous step.
        """
        if self._seen < self.sequence:
            self._await(self._others)
            self._seen = self.sequence

    def post(self) -> None:
        """Announce that this rank has written its data of the next step, and has read all data of the last one."""
        if self._seen < self.sequence:
            self.await_readers()
        self.sequence += 1
        self._posted = self.sequence << CALL_BITS | self._call
        self._release()
        self._acquire()
        self.words[self._row] = self._posted

    def await_all(self) -> None:
        """Wait until every rank has posted this step."""
        self._await(self._others)
        self._seen = self.sequence

    def await_one(self, rank: int) -> None:
        """Wait until ``rank`` has posted this step."""
        self._await([(rank, self.rows[rank])])

    def _await(self, ranks: Sequence[tuple[int, int]]) -> None:
        words, spins, posted = self.words, self._spins, self._posted
        floor = posted & ~CALL_MASK
        for _, flag in ranks:
            while words[flag] < floor:
                spins -= 1
                if spins < 0:
                    self.wait(lambda: [r for r, at in ranks if words[at] < floor])
                    break
            if 0 < words[flag] ^ posted <= CALL_MASK:  # the same step of another call
                raise self.fail(self._mismatch())
        self._release()
        self._acquire()

    def _mismatch(self) -> RankError:
        """The error that names the calls of all ranks at this step, which is the first of each call."""
        self.fence()
        here = [r for r, row in enumerate(self.rows) if self.words[row] >> CALL_BITS == self.sequence]
        starts = [self.rows[r] + CALL + (self.sequence & 1) * CALL_WORDS for r in here]
        calls = [describe(self.words[at : at + CALL_WORDS].tolist()) for at in starts]
        odd = min(zip(here, calls, strict=True), key=lambda each: (calls.count(each[1]), -each[0]))[0]
        text = "; ".join(f"rank {self.ranks[r]} calls {call}" for r, call in zip(here, calls, strict=True))
        return self.make_error(MismatchError, odd, f"ranks disagree: {text}")

    # ---- waits

    def wait(self, missing: Missing, name: str = "") -> None:
        """Return once ``missing()``, the ranks (within the group) still waited for, is empty.

        Args:
            missing: called repeatedly.
            name: the awaited operation, if it isn't this rank's latest collective.

        Raises:
            RankError: one of the ranks is dead or has failed.
            CollectiveTimeout: some ranks did not arrive in time.
        """
        start = looked = time.monotonic()
        waiting = self._row + WAITING
        pause = 50e-6
        while ranks := missing():
            moved = self._progress()
            now = time.monotonic()
            if moved:
                start, pause = now, 50e-6  # messages may have any length: the timeout is for time without progress
                continue
            if now - start < YIELDING:
                os.sched_yield()
                continue
            self.words[waiting] = ranks[0] + 1
            late = now - start > self.timeout
            if late or now - looked > LOOK:
                looked = now
                self._look_at(ranks, missing, name)
            if late:
                raise self.fail(self._late(ranks, name))
            time.sleep(pause)
            pause = min(pause * 1.2, 1e-3 if now - start < 1 else 5e-3)
        self.words[waiting] = 0

    def _look_at(self, ranks: Sequence[int], missing: Missing, name: str) -> None:
        for rank in ranks:
            failed = self.words[self.rows[rank] + FAILED]
            if not failed and self._peers[rank].alive:
                continue
            if rank not in missing():  # it arrived, and then left, during this check
                continue
            raise self.fail(self._gone(rank, failed, name))

    def _gone(self, rank: int, failed: int, name: str) -> RankError:
        who = self.ranks[rank]
        if not failed:
            return self.make_error(RankError, rank, f"rank {who} (process {self._peers[rank].pid}) died", name)
        kind, culprit = REASONS[failed >> 32], (failed & 0xFFFFFFFF) - 1
        why = "left the group" if culprit == rank else f"gave up because of rank {self.ranks[culprit]}"
        return self.make_error(kind, culprit, f"rank {who} {why}", name)

    def _late(self, ranks: Sequence[int], name: str) -> RankError:
        culprits = sorted({self._cause(rank) for rank in ranks})
        names = ", ".join(str(self.ranks[r]) for r in culprits)
        late = f"rank{'s' if len(culprits) > 1 else ''} {names} did not arrive within {self.timeout:g} s"
        if not set(culprits) & set(ranks):
            late += f" (rank {self.ranks[ranks[0]]} waits for it)"
        return self.make_error(CollectiveTimeout, culprits[0], late, name)

    def _cause(self, rank: int) -> int:
        """Follows from ``rank`` to the rank it waits for, and so on, to one that doesn't wait or is stopped."""
        seen = [self.rank]
        while rank not in seen:
            seen.append(rank)
            waits_for = self.words[self.rows[rank] + WAITING]
            if not waits_for or self._peers[rank].stopped:
                return rank
            rank = waits_for - 1
        return seen[1]  # they wait for one another

    # ---- failure

    def make_error(self, kind: type[RankError], culprit: int, what: str, name: str = "") -> RankError:
        name = name or describe(self._words)
        return kind(
            f"{what}; rank {self.ranks[self.rank]} was in {name}, call {self.calls} of its group",
            rank=self.ranks[culprit],
            collective=name.partition("(")[0],
            sequence_number=self.calls,
        )

    def fail(self, error: RankError) -> RankError:
        """Mark this rank as failed, so that no rank waits for it, and return the error to raise."""
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
        """End this rank's part in the group."""
        rank = self.ranks[self.rank]
        self.fail(RankError(f"rank {rank} {why}", rank=rank))
