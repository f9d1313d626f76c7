"""Seen from outside: ranks that are stopped, or that have been in one collective for too long."""

from __future__ import annotations

import time
from typing import Any

from multicard.ranks import hang
from multicard.ranks.calls import Call, Calls
from multicard.ranks.failure import Failure
from multicard.ranks.settings import Settings
from multicard.ranks.supervisor import Supervisor

ANSWER = 0.5
"""Seconds that ranks have to say what they are doing."""

PAUSE = 0.5
"""Seconds at least between two looks at where ranks are."""


class Watch:
    """Looks after the ranks of one job while a caller waits for them."""

    def __init__(self, supervisor: Supervisor, calls: Calls, settings: Settings) -> None:
        self._supervisor, self._calls, self._settings = supervisor, calls, settings
        self._stopped: dict[int, float] = {}
        self._waiting: dict[int, tuple[Any, float]] = {}
        self._looked = self._compared = time.monotonic()

    def begin(self) -> None:
        """A call begins: nobody has waited in it yet."""
        self._looked = self._compared = time.monotonic()

    def look(self, call: Call) -> None:
        """Answer ``call`` for ranks that hang, with what to raise."""
        self._look_for_stopped(call)
        self._look_for_left(call)
        self._look_for_hung(call)

    def wake_stopped(self) -> set[int]:
        """Stopped ranks, which from here on run again: they are about to be ended, and have a stack to tell first."""
        alive = {r: p for r, p in self._supervisor.processes.items() if r not in self._supervisor.dead}
        stopped = {rank for rank, process in alive.items() if process.stopped}
        for rank in stopped:
            alive[rank].wake()
        return stopped

    def in_step(self) -> bool:
        """Whether all ranks answer, and agree on how many collectives each group has been through."""
        activities = self._calls.inspect(ANSWER)
        counted: dict[str, set[int]] = {}
        for activity in activities.values():
            for group, number in activity["numbers"].items():
                counted.setdefault(group, set()).add(number)
        return len(activities) == len(self._supervisor.processes) and all(len(each) == 1 for each in counted.values())

    def waits_in_vain(self, call: Call) -> Failure | None:
        """What to raise where a rank is in a collective that a rank which has left ``call`` never entered."""
        activities = self._calls.inspect(ANSWER / 4)
        left = {rank: activities[rank]["numbers"] for rank in call.answers if rank in activities}
        for rank, activity in activities.items():
            waits = activity["call"]
            if rank in call.answers or waits is None or waits.number is None:
                continue
            for other in sorted(set(left).intersection(waits.ranks)):
                entered = left[other].get(waits.key)  # None where it has destroyed the group since
                if entered is not None and entered < waits.number:
                    return hang.left(other, call.label, waits, activities)
        return None

    def _look_for_stopped(self, call: Call) -> None:
        """A stopped rank that nobody waits for in a collective is a hang all the same."""
        now = time.monotonic()
        for rank, process in self._supervisor.processes.items():
            if rank in call.answers or not process.stopped:
                self._stopped.pop(rank, None)
            elif now - self._stopped.setdefault(rank, now) > self._settings.timeout + ANSWER:
                call.answers[rank] = hang.stopped(rank, self._settings)

    def _look_for_left(self, call: Call) -> None:
        """A rank that has left the call will never arrive where others wait for it."""
        some = 0 < len(call.answers) < len(self._supervisor.processes)
        if some and not call.failures and time.monotonic() - self._compared > PAUSE:
            self._compared = time.monotonic()
            found = self.waits_in_vain(call)
            if found is not None and found.call is not None and found.call.exact:
                call.answers[found.rank] = found

    def _look_for_hung(self, call: Call) -> None:
        """A rank that has been in one and the same collective for too long, whatever limit its backend has for that.

        Backends' own limits come first where they work; groups that scripts make have torch's, half an hour.
        """
        now, limit = time.monotonic(), self._settings.timeout
        if now - self._looked < max(limit / 20, PAUSE):
            return
        self._looked = now
        for rank, activity in self._calls.inspect(ANSWER).items():
            state = (activity["call"], activity["numbers"])
            if activity["call"] is None or self._waiting.get(rank, (None, 0.0))[0] != state:
                self._waiting[rank] = (state, now)
            elif now - self._waiting[rank][1] > limit + ANSWER and rank not in call.answers:
                call.answers[rank] = hang.waited(rank, activity["call"])
