"""What ranks have answered and reported, and which have died: filled from events, read as a snapshot."""

from __future__ import annotations

import dataclasses
import itertools
import math
import queue
import time

from multicard.errors import RankError
from multicard.ranks import failure, patience, wire
from multicard.ranks.activity import Report
from multicard.ranks.failure import Failure
from multicard.ranks.snapshot import Seen, Snapshot
from multicard.ranks.supervisor import Supervisor


@dataclasses.dataclass
class Call:
    """A call under way, named ``label`` in errors, on so many ``ranks``.

    Attributes:
        answers: of the ranks that have finished it well.
        failures: of those that have raised in it.
        moments: when each of both did so.
        failure: what it has been judged to have failed with.
        abandoned: nobody waits for it.
    """

    label: str
    ranks: int
    answers: dict[int, wire.Message] = dataclasses.field(default_factory=dict)
    failures: dict[int, Failure] = dataclasses.field(default_factory=dict)
    moments: dict[int, float] = dataclasses.field(default_factory=dict)
    failure: Failure | None = None
    abandoned: bool = False

    @property
    def settled(self) -> bool:
        return self.failure is not None or len(self.answers) == self.ranks


class Record:
    """One job's calls and ranks.

    Attributes:
        calls: those under way, by number.
        broken: why the ranks were ended, or None.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.calls: dict[int, Call] = {}
        self.broken: RankError | None = None
        self._supervisor = supervisor
        self._numbers = itertools.count(1)
        self._memory_kills = failure.kills_for_memory()
        self._ranks = dict.fromkeys(supervisor.processes, Seen())  # whatever they have answered to single calls
        self._opened = self._asked = self._looked = 0.0
        self._woken = False

    def open(self, label: str, number: int | None = None) -> int:
        """Begin a call, or the next part of call ``number``; returns its number.

        Ranks count as having been asked what they are doing, and nobody has waited in it yet.
        """
        number = number or next(self._numbers)
        self.calls[number] = Call(label, len(self._ranks))
        self._opened = self._asked = self._looked = time.monotonic()
        self._woken = False
        for rank in self._ranks:
            self._note(rank, stopped=None, report=None, unchanged=math.inf)
        return number

    def forget_abandoned(self) -> None:
        """Drop the calls that nobody waits for, once all ranks have finished them and failures have been judged."""
        for number, call in list(self.calls.items()):
            judged = call.failure is not None or not call.failures
            if call.abandoned and judged and len(call.moments) == call.ranks:
                del self.calls[number]

    def listen(self, seconds: float) -> None:
        """Take what has happened to ranks; wait so long for the first of it."""
        try:
            self._take(*self._supervisor.events.get(timeout=max(0.0, seconds)))
            while True:
                self._take(*self._supervisor.events.get_nowait())
        except queue.Empty:
            pass

    def ask(self, wake: bool = False) -> None:
        """Ask ranks what they are doing; ``wake`` stopped ones first."""
        self._look_for_stopped()
        self._woken = self._woken or wake
        self._asked = time.monotonic()
        for rank, process in self._supervisor.processes.items():
            if rank not in self._supervisor.dead:
                if wake and self._ranks[rank].stopped is not None:
                    process.wake()
                self._supervisor.send(rank, wire.Message("inspect", 0), patience.ASK)

    def snapshot(self, call: Call, deadline: float = math.inf) -> Snapshot:
        """What is known now. Which ranks are stopped is no event, and too slow to look at each time."""
        now = time.monotonic()
        if now > self._looked + patience.LOOP / 2:
            self._look_for_stopped()
        ranks = dict(self._ranks)
        for rank, seen in ranks.items():
            raised = call.failures.get(rank)
            if raised or not seen.dead:
                ranks[rank] = dataclasses.replace(seen, answered=call.moments.get(rank), failure=raised)
        return Snapshot(now, call.label, ranks, self._asked, deadline)

    def obituary(self, rank: int, moment: float) -> Failure:
        """The failure of a rank whose process has ended: by itself, or because all were ended."""
        if self.broken is not None:
            return Failure(rank, failure.OWN, moment, self.broken)
        tail = self._supervisor.processes[rank].tail
        out_of_memory = failure.kills_for_memory() > self._memory_kills
        doing = " and ".join(f"in {call.label}" for call in self.calls.values()) or "while idle"
        return failure.death(rank, self._supervisor.dead[rank], tail, out_of_memory, doing, moment)

    def _note(self, rank: int, **news: object) -> None:
        self._ranks[rank] = dataclasses.replace(self._ranks[rank], **news)  # type: ignore[arg-type]

    def _take(self, rank: int, message: wire.Message | None, moment: float) -> None:
        if message is None:
            self._note(rank, answered=moment, failure=self.obituary(rank, moment), dead=True)
        elif message.kind == "activity":
            self._hear(rank, message.load())
        elif (call := self.calls.get(message.call)) is not None:
            call.moments[rank] = moment
            if message.kind == "error":
                call.failures[rank] = failure.revive(rank, message)
            else:
                call.answers[rank] = message

    def _hear(self, rank: int, report: Report) -> None:
        last = self._ranks[rank].report
        if report.moment < self._opened:  # the answer to a question of an earlier call
            return
        if last is None or (last.collective, last.entered) != (report.collective, report.entered):
            self._note(rank, unchanged=report.moment)
        self._note(rank, report=report)

    def _look_for_stopped(self) -> None:
        self._looked = time.monotonic()
        if not self._woken:
            for rank, process in self._supervisor.processes.items():
                since = self._ranks[rank].stopped or self._looked
                held = rank not in self._supervisor.dead and process.stopped
                self._note(rank, stopped=since if held else None)
