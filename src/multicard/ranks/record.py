"""A record of ranks' answers, reports and deaths: filled from events, read as a snapshot."""

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
from multicard.ranks.supervisor import Event, Supervisor


@dataclasses.dataclass
class Call:
    """A call under way, named ``label`` in errors.

    Attributes:
        answers: of the ranks that have finished it without an error.
        failures: of the ranks that have raised in it.
        moments: when each rank answered or failed.
        failure: the judged failure of the call.
        abandoned: no thread waits for it any more.
    """

    label: str
    answers: dict[int, wire.Message] = dataclasses.field(default_factory=dict)
    failures: dict[int, Failure] = dataclasses.field(default_factory=dict)
    moments: dict[int, float] = dataclasses.field(default_factory=dict)
    failure: Failure | None = None
    abandoned: bool = False


class Record:
    """One job's calls and ranks.

    Attributes:
        calls: the calls under way, by number.
        broken: why the ranks were ended, or None.
    """

    _reports: dict[int, Report]
    _unchanged: dict[int, float]
    _stopped: dict[int, float]
    _woken: bool

    def __init__(self, supervisor: Supervisor) -> None:
        self.calls: dict[int, Call] = {}
        self.broken: RankError | None = None
        self._supervisor = supervisor
        self._numbers = itertools.count(1)
        self._memory_kills = failure.kills_for_memory()
        self._deaths: dict[int, Failure] = {}
        self._forget_reports()

    def open(self, label: str, number: int | None = None) -> int:
        """Begin a call, or the next part of call ``number``; returns its number."""
        number = number or next(self._numbers)
        self.calls[number] = Call(label)
        self._forget_reports()
        return number

    def forget_abandoned(self) -> None:
        """Drop abandoned calls once all ranks have finished them and failures have been judged."""
        for number, call in list(self.calls.items()):
            judged = call.failure is not None or not call.failures
            if call.abandoned and judged and len(call.moments) == len(self._supervisor.processes):
                del self.calls[number]

    def listen(self, seconds: float) -> None:
        """Record events of ranks; wait up to so many seconds for the first."""
        try:
            event = self._supervisor.events.get(timeout=max(0.0, seconds))
            while True:
                self._take(event)
                event = self._supervisor.events.get_nowait()
        except queue.Empty:
            pass

    def ask(self, wake: bool = False) -> None:
        """Ask ranks what they are doing; ``wake`` stopped ones first."""
        self._look_for_stopped()
        self._woken = self._woken or wake
        self._asked = time.monotonic()
        for rank, process in self._supervisor.processes.items():
            if rank not in self._supervisor.dead:
                if wake and rank in self._stopped:
                    process.wake()
                self._supervisor.send(rank, wire.Message("inspect", 0), patience.ASK)

    def snapshot(self, call: Call, deadline: float = math.inf) -> Snapshot:
        """The current state. Stopped ranks give no event, and checking them every time would be too slow."""
        now = time.monotonic()
        if now > self._looked + patience.LOOP / 2:
            self._look_for_stopped()
        ranks = {rank: self._seen(rank, call) for rank in self._supervisor.processes}
        return Snapshot(now, call.label, ranks, self._asked, deadline)

    def obituary(self, rank: int, moment: float) -> Failure:
        """The failure of a rank whose process has ended: by itself, or because all were ended."""
        if self.broken is not None:
            return Failure(rank, failure.OWN, moment, self.broken)
        tail = self._supervisor.processes[rank].tail
        out_of_memory = failure.kills_for_memory() > self._memory_kills
        doing = " and ".join(f"in {call.label}" for call in self.calls.values()) or "while idle"
        return failure.death(rank, self._supervisor.dead[rank], tail, out_of_memory, doing, moment)

    def _seen(self, rank: int, call: Call) -> Seen:
        death, raised = self._deaths.get(rank), call.failures.get(rank)
        return Seen(
            answered=death.moment if death and not raised else call.moments.get(rank),
            failure=raised or death,
            dead=death is not None,
            stopped=self._stopped.get(rank),
            report=self._reports.get(rank),
            unchanged=self._unchanged.get(rank, math.inf),
        )

    def _take(self, event: Event) -> None:
        rank, message = event.rank, event.message
        if message is None:
            self._deaths[rank] = self.obituary(rank, event.moment)
        elif message.kind == "activity":
            self._hear(rank, message.load())
        elif (call := self.calls.get(message.call)) is not None:
            call.moments[rank] = event.moment
            if message.kind == "error":
                call.failures[rank] = failure.revive(rank, message)
            else:
                call.answers[rank] = message

    def _hear(self, rank: int, report: Report) -> None:
        if report.moment < self._opened:  # the answer to a question asked in an earlier call
            return
        last = self._reports.get(rank)
        if last is None or (last.collective, last.entered) != (report.collective, report.entered):
            self._unchanged[rank] = report.moment
        self._reports[rank] = report

    def _look_for_stopped(self) -> None:
        self._looked = time.monotonic()
        if not self._woken:
            living = [each for each in self._supervisor.processes.values() if each.rank not in self._supervisor.dead]
            self._stopped = {each.rank: self._stopped.get(each.rank, self._looked) for each in living if each.stopped}

    def _forget_reports(self) -> None:
        """A call begins: ranks count as asked, and none has waited in a collective of it yet."""
        self._opened = self._asked = self._looked = time.monotonic()
        self._reports, self._unchanged, self._stopped, self._woken = {}, {}, {}, False
