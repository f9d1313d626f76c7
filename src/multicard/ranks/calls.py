"""The calls that ranks are in, and what each rank has answered: filled from what happens to their processes."""

from __future__ import annotations

import dataclasses
import queue
import time
from typing import Any

from multicard.errors import RankError
from multicard.ranks import failure, wire
from multicard.ranks.failure import Failure
from multicard.ranks.supervisor import Supervisor


@dataclasses.dataclass
class Call:
    """A call, named ``label`` in errors: what each rank has answered since it was last asked.

    Attributes:
        settled: a rank has failed it, and the others have had the time to finish it too.
        abandoned: nobody waits for its answers.
    """

    label: str
    answers: dict[int, wire.Message | Failure] = dataclasses.field(default_factory=dict)
    settled: bool = False
    abandoned: bool = False

    @property
    def failures(self) -> list[Failure]:
        return [answer for answer in self.answers.values() if isinstance(answer, Failure)]


class Calls:
    """Calls under way.

    Attributes:
        under_way: the calls, by number.
        broken: why ranks take no further calls, or None.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.under_way: dict[int, Call] = {}
        self.broken: RankError | None = None
        self._supervisor = supervisor
        self._count = 0
        self._memory_kills = failure.kills_for_memory()

    def open(self, label: str) -> int:
        """A new call's number."""
        self._count += 1
        self.under_way[self._count] = Call(label)
        return self._count

    def listen(self, timeout: float) -> None:
        """Take what ranks have answered and which have ended; wait ``timeout`` seconds for the first of it."""
        try:
            event = self._supervisor.events.get(timeout=timeout)
            while True:
                self._take(event.rank, event.message)
                event = self._supervisor.events.get_nowait()
        except queue.Empty:
            pass

    def listen_to(self, call: Call, ranks: int, patience: float) -> None:
        """Take answers until so many ranks have answered ``call``, ``patience`` seconds at most."""
        deadline = time.monotonic() + patience
        while len(call.answers) < ranks and (left := deadline - time.monotonic()) > 0:
            self.listen(left)

    def forget_abandoned(self, ranks: int) -> None:
        """Drop the calls that nobody waits for and that all ``ranks`` have answered well."""
        for number, call in list(self.under_way.items()):
            if call.abandoned and len(call.answers) == ranks and not call.failures:
                del self.under_way[number]

    def inspect(self, patience: float) -> dict[int, dict[str, Any]]:
        """What every rank that answers within ``patience`` seconds is doing (``activity.report``), by rank."""
        number = self.open("inspect")
        asked = [rank for rank in self._supervisor.processes if rank not in self._supervisor.dead]
        for rank in asked:
            self._supervisor.send(rank, wire.Message("inspect", number), 0.1)
        self.listen_to(self.under_way[number], len(asked), patience)
        answers = self.under_way.pop(number).answers
        return {rank: report.load() for rank, report in answers.items() if isinstance(report, wire.Message)}

    def obituary(self, rank: int) -> Failure:
        """The failure of a rank whose process has ended: its own end, or that of all."""
        if self.broken is not None:
            return Failure(rank, failure.OWN, time.monotonic(), self.broken)
        tail = self._supervisor.processes[rank].tail
        out_of_memory = failure.kills_for_memory() > self._memory_kills
        doing = " and ".join(f"in {call.label}" for call in self.under_way.values()) or "while idle"
        return failure.death(rank, self._supervisor.dead[rank], tail, out_of_memory, doing)

    def _take(self, rank: int, message: wire.Message | None) -> None:
        if message is None:
            obituary = self.obituary(rank)
            for call in self.under_way.values():
                call.answers.setdefault(rank, obituary)
        elif message.call in self.under_way:
            answer = failure.revive(rank, message) if message.kind == "error" else message
            self.under_way[message.call].answers[rank] = answer
