"""Ranks as child processes that answer calls; who waits for them gets every answer or the first real failure."""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from multicard.errors import CheckpointError, ConfigError, RankError, UnsupportedError
from multicard.ranks import environment, failure, hang, wire
from multicard.ranks.failure import Failure
from multicard.ranks.hosts import POLL, Neighbours
from multicard.ranks.logs import Logs
from multicard.ranks.settings import Settings
from multicard.ranks.supervisor import Supervisor

SETTLE = 0.5
"""Seconds that the other ranks have to finish a call in which one has failed, before all are ended."""

REFUSED = (ConfigError, UnsupportedError, CheckpointError)
REFUSED_SETTLE = 5.0
"""The same where a rank refused its input: all do, and a busy machine is no reason to lose a loaded model."""


@dataclasses.dataclass
class _Open:
    """A call that ranks are in, named ``label`` in errors: what each has answered since it was last asked."""

    label: str
    answers: dict[int, wire.Message | Failure] = dataclasses.field(default_factory=dict)
    settled: bool = False
    abandoned: bool = False

    @property
    def failures(self) -> list[Failure]:
        return [answer for answer in self.answers.values() if isinstance(answer, Failure)]


class Children:
    """A job's ranks. Calls from several threads take turns."""

    def __init__(self, settings: Settings, settle: float = SETTLE) -> None:
        self.settings = settings
        self._settle_time = settle
        self.broken: str | None = None
        self._ranks = settings.ranks
        self._size = len(self._ranks)
        self._calls = 0
        self._turn = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._later: collections.deque[tuple[str, int]] = collections.deque()
        self._stopped: dict[int, float] = {}
        self._waiting: dict[int, tuple[Any, float]] = {}
        self._looked = time.monotonic()
        self._memory_kills = failure.kills_for_memory()
        hosts = settings.hosts
        self._store, port = None, hosts.port
        if hosts.index == 0:
            self._store, port = environment.host_store(settings.start_timeout, hosts.address, hosts.port)
        self._supervisor = Supervisor(
            {rank: environment.of_rank(settings, rank, port) for rank in self._ranks},
            Logs(self._ranks, settings.log_dir, settings.console),
        )
        self._neighbours = (
            Neighbours(hosts, port, settings.start_timeout, settings.timeout) if hosts.count > 1 else None
        )

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.popen.pid for process in self._supervisor.processes.values()]

    @property
    def alive(self) -> bool:
        """Whether they take further calls."""
        return self.broken is None and not self._supervisor.dead

    def start(self) -> float:
        """Wait until all ranks have started; returns the moment by which they have to meet."""
        deadline = time.monotonic() + self.settings.start_timeout
        self.finish(self.begin("start", None, "start"), deadline)
        return deadline

    def join(self) -> None:
        """Wait until all ranks have started, then let them meet; within ``start_timeout`` in all."""
        deadline = self.start()
        self.finish(self.begin("join", self._joining, "init_mesh"), deadline)

    @property
    def _joining(self) -> dict[str, Any]:
        wanted = self.settings
        return {"config": wanted.config, "backend": wanted.backend, "device": wanted.device, "timeout": wanted.timeout}

    # calls

    def run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """``fn(mesh, ...)`` on every rank: values by rank."""
        return [message.load() for message in self.call("run", (fn, args, kwargs), _name(fn))]

    def keep(self, key: int, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The same, where the value stays until it is dropped."""
        self.call("keep", (key, fn, args, kwargs), _name(fn))

    def drop(self, key: int) -> None:
        """Forget what is kept, before the next command; safe in a finalizer."""
        self._later.append(("drop", key))

    def stream(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """What rank 0's generator yields; ranks are one item ahead."""
        call = self.begin("open", (fn, args, kwargs), _name(fn))
        self.finish(call)
        try:
            self.step("next", call, _name(fn))
            while (answer := self.finish(call)[0]).kind != "end":
                self.step("next", call, _name(fn))
                yield answer.load()
        finally:
            self._later.append(("close", call))

    # talking

    def call(self, kind: str, value: Any, label: str) -> list[wire.Message]:
        """Send one command to every rank and wait for their answers, by rank; ``label`` names it in errors."""
        return self.finish(self.begin(kind, value, label))

    def begin(self, kind: str, value: Any, label: str) -> int:
        """Send a command to every rank; returns the call's number, for :meth:`step` and :meth:`finish`."""
        message = wire.pack(kind, 0, value)
        with self._turn:
            self._refuse_if_broken()
            self._calls += 1
            self._looked = time.monotonic()
            self._open[self._calls] = _Open(label)
            self._send_all(dataclasses.replace(message, call=self._calls))
            return self._calls

    def step(self, kind: str, call: int, label: str) -> None:
        """Send a further command of a call that has begun."""
        with self._turn:
            self._refuse_if_broken()
            self._open[call] = _Open(label)
            self._send_all(wire.Message(kind, call))

    def finish(self, call: int, deadline: float | None = None) -> list[wire.Message]:
        """Every rank's next answer to ``call``, by rank. Raises the first real failure."""
        with self._turn:
            try:
                failures = self._wait(call, deadline)
                answers = self._open.pop(call).answers
            except BaseException as error:
                self.end(f"interrupted by {type(error).__name__}")
                raise
        if failures:
            raise self._where_it_began(failure.first_real(failures)).error
        return [message for _, message in sorted(answers.items()) if isinstance(message, wire.Message)]

    def _where_it_began(self, first: Failure) -> Failure:
        """This host's first failure, or the one on another host that it follows from; others are told."""
        if self._neighbours is None:
            return first
        if first.kind != failure.OWN and (elsewhere := self._neighbours.await_failure(8 * POLL)) is not None:
            return elsewhere
        self._neighbours.tell(first.error)
        return first

    def meet_hosts(self) -> None:
        """Wait until every host's ranks are done. Raises what went wrong elsewhere."""
        if self._neighbours is not None and (elsewhere := self._neighbours.finish()) is not None:
            raise elsewhere.error

    def end(self, why: str, grace: float = 0.0) -> None:
        """End all ranks; ``why`` is what later calls are told."""
        self.broken = self.broken or why
        self._supervisor.end(grace)
        if self._neighbours is None:  # other hosts have yet to read there why
            self._store = None

    def _refuse_if_broken(self) -> None:
        if self.broken is None and self._supervisor.dead:
            self.end(str(self._obituary(next(iter(self._supervisor.dead))).error))
        if self.broken is not None:
            raise RankError(f"these ranks have ended ({self.broken}): restart() starts new ones")

    def _send_all(self, message: wire.Message) -> None:
        while self._later:
            kind, call = self._later.popleft()
            self._send_all(wire.Message(kind, call))
        if message.kind == "close" and message.call in self._open:
            self._open[message.call].abandoned = True
        for rank in self._ranks:
            self._supervisor.send(rank, message, self.settings.timeout)

    # waiting

    def _wait(self, call: int, deadline: float | None) -> list[Failure]:
        """Until every rank has answered ``call`` or one has failed; returns the failures."""
        mine = self._open[call]
        while True:
            for opened in list(self._open.values()):
                if opened.failures and not opened.settled:
                    self._settle(opened)
            if mine.failures or len(mine.answers) == self._size:
                return mine.failures
            left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if left <= 0:
                return [self._late(mine)]
            self._take_events(left)
            self._look_for_stopped(mine)
            self._look_for_hung(mine)
            if self._neighbours is not None and (elsewhere := self._neighbours.failure) is not None:
                self.end(str(elsewhere.error))
                return [elsewhere]
            for number, opened in list(self._open.items()):
                if opened.abandoned and len(opened.answers) == self._size and not opened.failures:
                    del self._open[number]

    def _take_events(self, timeout: float) -> None:
        try:
            event = self._supervisor.events.get(timeout=timeout)
            while True:
                self._take(event.rank, event.message)
                event = self._supervisor.events.get_nowait()
        except queue.Empty:
            pass

    def _take(self, rank: int, message: wire.Message | None) -> None:
        if message is None:
            obituary = self._obituary(rank)
            for opened in self._open.values():
                opened.answers.setdefault(rank, obituary)
        elif message.call in self._open:
            answer = failure.revive(rank, message) if message.kind == "error" else message
            self._open[message.call].answers[rank] = answer

    def _obituary(self, rank: int) -> Failure:
        if self.broken is not None:
            return Failure(rank, failure.OWN, time.monotonic(), RankError(f"these ranks have ended ({self.broken})"))
        tail = self._supervisor.processes[rank].tail
        out_of_memory = failure.kills_for_memory() > self._memory_kills
        doing = " and ".join(f"in {opened.label}" for opened in self._open.values()) or "while idle"
        return failure.death(rank, self._supervisor.dead[rank], tail, out_of_memory, doing)

    # failing

    def _settle(self, opened: _Open) -> None:
        """A rank has failed a call: give the others the time to finish it too, and end all if they can't.

        The ranks live on where all have finished the call and have entered the same collectives in it: then nothing
        of it is left under way that a later call could mistake for its own.
        """
        opened.settled = True
        first = failure.first_real(opened.failures)
        patience = REFUSED_SETTLE if isinstance(first.error, REFUSED) else self._settle_time
        deadline = time.monotonic() + patience
        while len(opened.answers) < self._size and (left := deadline - time.monotonic()) > 0:
            self._take_events(left)
        first = failure.first_real(opened.failures)
        if first.kind == failure.TIMEOUT and self.broken is None and not self._supervisor.dead:
            stopped = self._wake_stopped()
            first = hang.explain(opened.failures, self._inspect(), stopped, self.settings)
            opened.answers = {first.rank: first}
        if first.spoils or len(opened.answers) < self._size or not self.alive or not self._in_step():
            self.end(str(first.error))

    def _in_step(self) -> bool:
        """Whether ranks agree on how many collectives each group has been through."""
        activities = self._inspect()
        counted: dict[str, set[int]] = {}
        for activity in activities.values():
            for group, number in activity["numbers"].items():
                counted.setdefault(group, set()).add(number)
        return len(activities) == self._size and all(len(numbers) == 1 for numbers in counted.values())

    def _inspect(self, patience: float = SETTLE) -> dict[int, dict[str, Any]]:
        """What every rank that still answers is doing, by rank."""
        self._calls += 1
        opened = self._open[self._calls] = _Open("inspect")
        asked = [rank for rank in self._ranks if rank not in self._supervisor.dead]
        for rank in asked:
            self._supervisor.send(rank, wire.Message("inspect", self._calls), 0.1)
        deadline = time.monotonic() + patience
        while len(opened.answers) < len(asked) and (left := deadline - time.monotonic()) > 0:
            self._take_events(left)
        del self._open[self._calls]
        return {rank: report.load() for rank, report in opened.answers.items() if isinstance(report, wire.Message)}

    def _late(self, opened: _Open) -> Failure:
        """Ranks that did not start in time."""
        missing = [rank for rank in self._ranks if rank not in opened.answers]
        stopped = self._wake_stopped()
        late = hang.late(missing, self._inspect(), stopped, self.settings)
        self.end(str(late.error))
        return late

    def _look_for_stopped(self, opened: _Open) -> None:
        """A stopped rank that nobody waits for in a collective is a hang all the same."""
        now = time.monotonic()
        for rank, process in self._supervisor.processes.items():
            if rank in opened.answers or not process.stopped:
                self._stopped.pop(rank, None)
            elif now - self._stopped.setdefault(rank, now) > self.settings.timeout + SETTLE:
                opened.answers[rank] = hang.stopped(rank, self.settings)

    def _look_for_hung(self, opened: _Open) -> None:
        """A rank that has been in one and the same collective for too long, whatever limit its backend has for that.

        Backends' own limits come first where they work; groups that scripts make have torch's, half an hour.
        """
        now, limit = time.monotonic(), self.settings.timeout
        if now - self._looked < max(limit / 4, 1.0):
            return
        self._looked = now
        for rank, activity in self._inspect().items():
            state = (activity["call"], activity["numbers"])
            if activity["call"] is None or self._waiting.get(rank, (None, 0.0))[0] != state:
                self._waiting[rank] = (state, now)
            elif now - self._waiting[rank][1] > limit + SETTLE and rank not in opened.answers:
                opened.answers[rank] = hang.waited(rank, activity["call"])

    def _wake_stopped(self) -> set[int]:
        """Stopped ranks, which from here on run again: they are about to be ended, and have a stack to tell first."""
        processes = self._supervisor.processes
        stopped = {rank for rank in self._ranks if rank not in self._supervisor.dead and processes[rank].stopped}
        for rank in stopped:
            processes[rank].wake()
        return stopped


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
