"""Ranks as child processes that answer calls: the caller gets every rank's answer, or the failure that came first.

A call is one loop: record what has happened to ranks (:mod:`record`), judge the snapshot (:mod:`judge`), and act on the
verdict: raise and end the ranks, or ask them what they are doing and go on waiting.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from multicard.errors import RankError, UnsupportedError
from multicard.memory import check_proc
from multicard.ranks import environment, failure, interrupt, patience, starter, wire
from multicard.ranks.failure import Failure
from multicard.ranks.hosts import Neighbours
from multicard.ranks.judge import Wait, judge
from multicard.ranks.patience import Patience
from multicard.ranks.record import Call, Record
from multicard.ranks.settings import Settings
from multicard.ranks.supervisor import Supervisor
from multicard.rendezvous import free_port, host_store


class Children:
    """A job's ranks. Calls from several threads take turns.

    Args:
        others: seconds that the other ranks have to finish a call in which one has failed.

    Attributes:
        told: whether a call has raised because they ended, so that a caller knows of it.
    """

    def __init__(self, settings: Settings, others: float = Patience.others) -> None:
        self.settings = settings
        self.told = False
        self._patience = Patience(settings.timeout, settings.start_timeout, others)
        self._owner = os.getpid()
        self._turn = threading.Lock()
        self._later: collections.deque[tuple[str, int]] = collections.deque()
        hosts = settings.hosts
        check_proc()
        server = starter.server(environment.shared(settings))  # it imports torch while the next line does
        port = hosts.port or free_port()  # on one host nothing listens there, unless a script does
        self._store, self._neighbours = None, None
        if hosts.count > 1:
            if hosts.index == 0:
                self._store = host_store(settings.start_timeout, hosts.address, hosts.port)
            self._neighbours = Neighbours(hosts, len(settings.ranks), settings.start_timeout, settings.timeout)
        self._supervisor = Supervisor(settings, port, server)
        self._record = Record(self._supervisor)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._supervisor.processes.values()]

    @property
    def alive(self) -> bool:
        """Whether they take further calls."""
        return self._record.broken is None and not self._supervisor.dead

    def start(self) -> float:
        """Wait until all ranks have started; returns the moment by which they must have met."""
        deadline = time.monotonic() + self.settings.start_timeout
        self.finish(self.begin("start", None, "start"), deadline)
        return deadline

    def join(self) -> None:
        deadline = self.start()
        self.finish(self.begin("join", self.settings.mesh, "init_mesh"), deadline)

    # calls

    def run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """``fn(mesh, ...)`` on every rank: values by rank."""
        return [message.load() for message in self.call("run", (fn, args, kwargs), _name(fn))]

    def keep(self, key: int, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[float]:
        """The same, where the value stays on its rank until it is dropped. To be exhausted.

        Yields what rank 0's ``fn`` yields if it is a generator function, whose value is what it returns at last.
        """
        return self._iterate("keep", (key, fn, args, kwargs), _name(fn))

    def drop(self, key: int) -> None:
        """Forget what is kept as ``key``: with the next command, so that finalizers can call this."""
        self._later.append(("drop", key))

    def stream(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """What rank 0's ``fn(mesh, ...)`` yields. Ranks work one item ahead of what has been yielded."""
        return self._iterate("open", (fn, args, kwargs), _name(fn))

    def _iterate(self, kind: str, value: Any, label: str) -> Iterator[Any]:
        call = self.begin(kind, value, label)
        self.finish(call)
        try:
            self.begin("next", None, label, call)
            while items := self.finish(call)[0].load():
                self.begin("next", None, label, call)
                yield from items
        finally:
            self._later.append(("close", call))

    def call(self, kind: str, value: Any, label: str) -> list[wire.Message]:
        """Send one command to every rank and wait for their answers, by rank; ``label`` names it in errors."""
        return self.finish(self.begin(kind, value, label))

    def begin(self, kind: str, value: Any, label: str, call: int | None = None) -> int:
        """Send a command to every rank, a further one of ``call`` or of a new call, whose number is returned."""
        if os.getpid() != self._owner:
            raise UnsupportedError(f"these ranks are process {self._owner}'s: a process forked from it starts its own")
        message = wire.pack(kind, 0, value)
        with self._turn:
            self._refuse_if_ended()
            while self._later:
                self._forget(*self._later.popleft())
            number = self._record.open(label, call)
            self._send(dataclasses.replace(message, call=number))
            return number

    def finish(self, number: int, deadline: float = math.inf) -> list[wire.Message]:
        """Every rank's answer to the last command of the call, by rank. Raises what it failed with."""
        with self._turn:
            try:
                call = self._wait(number, deadline)
                del self._record.calls[number]
            except BaseException as error:
                self.end(f"interrupted by {type(error).__name__}")
                self.told = True
                raise
        if call.failure is not None:
            self.told = self._record.broken is not None
            raise self._where_it_began(call.failure).error
        return [message for _, message in sorted(call.answers.items())]

    def meet_hosts(self) -> None:
        """Wait until every host's ranks are done. Raises the failure of another host, if there is one."""
        if self._neighbours is not None and (elsewhere := self._neighbours.finish()) is not None:
            raise elsewhere.error

    def end(self, why: str | BaseException, grace: float = 0.0) -> None:
        """End them: after ``grace`` seconds by SIGKILL. Later calls raise an error that says ``why``.

        In a process that was forked from the ranks' own nothing happens.
        """
        if os.getpid() != self._owner:
            return
        self._record.broken = self._record.broken or _ended(why)
        self._supervisor.end(grace)
        if self._neighbours is None:  # other hosts have yet to read there why
            self._store = None

    def _refuse_if_ended(self) -> None:
        if self._record.broken is None and self._supervisor.dead:
            self.end(self._record.obituary(next(iter(self._supervisor.dead)), time.monotonic()).error)
        if self._record.broken is not None:
            self.told = True
            raise self._record.broken.with_traceback(None)

    def _forget(self, kind: str, number: int) -> None:
        """Close the stream of a call, or drop a kept value; nobody waits for that."""
        if kind == "close" and number in self._record.calls:
            self._record.calls[number].abandoned = True
        self._send(wire.pack(kind, 0, number))

    def _send(self, message: wire.Message) -> None:
        for rank in self.settings.ranks:
            self._supervisor.send(rank, message, self.settings.timeout)

    # waiting

    def _wait(self, number: int, deadline: float) -> Call:
        """Wait until every rank has finished the call without an error, or the call has a ``failure``."""
        call, interrupted = self._record.calls[number], interrupt.reached_main_thread()
        self._record.listen(0)
        while True:
            wait = self._judge(call, deadline)
            if call.settled:
                return call
            if self._neighbours is not None and (elsewhere := self._neighbours.failure) is not None:
                self._fail(call, elsewhere)
                return call
            if not interrupted and interrupt.reached_main_thread():
                raise KeyboardInterrupt
            if wait.ask:
                self._record.ask(wait.wake)
            self._record.listen(min(wait.until - time.monotonic(), patience.LOOP))
            self._record.forget_abandoned()

    def _judge(self, call: Call, deadline: float) -> Wait:
        """Judge the call, and before it the others in which a rank has failed: they may be what it waits for."""
        waits = []
        others = [each for each in self._record.calls.values() if each.suspect and each is not call]
        for each in [*others, call]:
            if not each.settled:
                verdict = judge(self._record.snapshot(each, deadline if each is call else math.inf), self._patience)
                if isinstance(verdict, Failure):
                    self._fail(each, verdict)
                else:
                    waits.append(verdict)
        until = min((each.until for each in waits), default=math.inf)
        return Wait(until, any(each.ask for each in waits), any(each.wake for each in waits))

    def _fail(self, call: Call, found: Failure) -> None:
        call.failure = found
        if found.fatal:
            self.end(found.error)

    def _where_it_began(self, first: Failure) -> Failure:
        """This host's failure, which is reported to the others, or the failure on another host that caused it."""
        if self._neighbours is None:
            return first
        if first.kind != failure.OWN:
            broke = first.moment if first.kind == failure.CONSEQUENCE else None
            if (elsewhere := self._neighbours.await_failure(patience.STORE_CAUSE, broke)) is not None:
                return elsewhere
        self._neighbours.tell(first.error)
        return first


def _ended(why: str | BaseException) -> RankError:
    """The error of calls after the ranks have ended; with the rank and signal of ``why``, if it has them."""
    cause = why if isinstance(why, RankError) else getattr(why, "__cause__", None)
    known = {name: getattr(cause, name, None) for name in ("rank", "signal", "stderr")}
    text = cause if isinstance(cause, RankError) else why
    return RankError(f"these ranks have ended ({text}): restart() starts new ones", **known)


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
