"""A record of ranks' answers, reports and deaths: filled from events, read as a snapshot."""

from __future__ import annotations

import dataclasses
import itertools
import math
import queue
import time
from typing import Any

from multicard.errors import RankError
from multicard.ranks import failure, patience, wire
from multicard.ranks.activity import Report
from multicard.ranks.failure import Failure
from multicard.ranks.snapshot import Seen, Snapshot
from multicard.ranks.supervisor import Supervisor


@dataclasses.dataclass
class Call:
    """A call under way, named ``label`` in errors.

    Attributes:
        ranks: what is known of each.
        answers: of the ranks that have finished it well.
        failure: what it has been judged to have failed with.
        abandoned: nobody waits for it.
    """

    label: str
    ranks: dict[int, Seen]
    answers: dict[int, wire.Message] = dataclasses.field(default_factory=dict)
    failure: Failure | None = None
    abandoned: bool = False

    @property
    def settled(self) -> bool:
        return self.failure is not None or len(self.answers) == len(self.ranks)

    @property
    def suspect(self) -> bool:
        """Whether a rank has failed in it, and that is still to be judged."""
        return self.failure is None and any(seen.failure for seen in self.ranks.values())

    def note(self, rank: int, **news: Any) -> None:
        self.ranks[rank] = dataclasses.replace(self.ranks[rank], **news)


class Record:
    """One job's calls and ranks.

    Attributes:
        calls: the calls under way, by number.
        broken: why the ranks were ended, or None.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.calls: dict[int, Call] = {}
        self.broken: RankError | None = None
        self._supervisor = supervisor
        self._numbers = itertools.count(1)
        self._memory_kills = failure.kills_for_memory()
        self._opened = self._asked = self._looked = 0.0
        self._woken = False

    def open(self, label: str, number: int | None = None) -> int:
        """Begin a call, or the next part of call ``number``; returns its number.

        Ranks count as having been asked what they are doing.
        """
        number = number or next(self._numbers)
        self.calls[number] = Call(label, dict.fromkeys(self._supervisor.processes, Seen()))
        self._opened = self._asked = self._looked = time.monotonic()
        self._woken = False
        return number

    def forget_abandoned(self) -> None:
        """Drop abandoned calls once all ranks have finished them and failures have been judged."""
        for number, call in list(self.calls.items()):
            answered = all(seen.answered is not None for seen in call.ranks.values())
            if call.abandoned and answered and not call.suspect:
                del self.calls[number]

    def listen(self, seconds: float) -> None:
        """Record events of ranks; wait up to so many seconds for the first."""
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
                if wake:
                    process.wake()
                self._supervisor.send(rank, wire.Message("inspect", 0), patience.ASK)

    def snapshot(self, call: Call, deadline: float = math.inf) -> Snapshot:
        """The current state. Stopped ranks give no event, and checking them every time would be too slow."""
        now = time.monotonic()
        if now > self._looked + patience.LOOP / 2:
            self._look_for_stopped()
        return Snapshot(now, call.label, dict(call.ranks), self._asked, deadline)

    def obituary(self, rank: int, moment: float) -> Failure:
        """The failure of a rank whose process has ended: by itself, or because all were ended."""
        if self.broken is not None:
            return Failure(rank, failure.OWN, moment, self.broken)
        tail = self._supervisor.processes[rank].tail
        out_of_memory = failure.kills_for_memory() > self._memory_kills
        doing = " and ".join(f"in {call.label}" for call in self.calls.values()) or "while idle"
        return failure.death(rank, self._supervisor.dead[rank], tail, out_of_memory, doing, moment)

    def _take(self, rank: int, message: wire.Message | None, moment: float) -> None:
        if message is None:
            death = self.obituary(rank, moment)
            for call in self.calls.values():
                call.note(rank, dead=True)
                if call.ranks[rank].failure is None:
                    call.note(rank, answered=moment, failure=death)
        elif message.kind == "activity":
            self._hear(rank, message.load())
        elif (own := self.calls.get(message.call)) is not None:
            raised = failure.revive(message) if message.kind == "error" else None
            own.note(rank, answered=moment, failure=raised)
            if raised is None:
                own.answers[rank] = message

    def _hear(self, rank: int, report: Report) -> None:
        if report.moment < self._opened:  # the answer to a question asked in an earlier call
            return
        for call in self.calls.values():
            last = call.ranks[rank].report
            if last is None or (last.collective, last.entered) != (report.collective, report.entered):
                call.note(rank, unchanged=report.moment)
            call.note(rank, report=report)

    def _look_for_stopped(self) -> None:
        self._looked = time.monotonic()
        if not self._woken:
            for rank, process in self._supervisor.processes.items():
                held = rank not in self._supervisor.dead and process.stopped
                for call in self.calls.values():
                    since = call.ranks[rank].stopped or self._looked
                    call.note(rank, stopped=since if held else None)
