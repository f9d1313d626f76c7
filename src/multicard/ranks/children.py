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
from multicard.ranks import environment, failure, interrupt, patience, starter, wire
from multicard.ranks.failure import Failure
from multicard.ranks.hosts import Neighbours
from multicard.ranks.judge import Wait, judge
from multicard.ranks.logs import Logs
from multicard.ranks.patience import Patience
from multicard.ranks.record import Call, Record
from multicard.ranks.settings import Settings
from multicard.ranks.supervisor import Supervisor
from multicard.rendezvous import host_store


class Children:
    """A job's ranks, see :class:`multicard.ranks.crew.Crew`. Calls from several threads take turns.

    Args:
        others: seconds in which the other ranks may finish a call after one has failed.
    """

    def __init__(self, settings: Settings, others: float = Patience.others) -> None:
        self.settings = settings
        self.told = False
        self._patience = Patience(settings.timeout, settings.start_timeout, others)
        self._owner = os.getpid()
        self._turn = threading.Lock()
        self._later: collections.deque[tuple[str, int]] = collections.deque()
        hosts = settings.hosts
        server = starter.server(environment.shared(settings))  # it imports torch while the next line does
        self._store, port = None, hosts.port
        if hosts.index == 0:
            self._store, port = host_store(settings.start_timeout, hosts.address, hosts.port)
        self._neighbours = (
            Neighbours(hosts, port, settings.start_timeout, settings.timeout) if hosts.count > 1 else None
        )
        self._supervisor = Supervisor(
            {rank: environment.of_rank(settings, rank, port) for rank in settings.ranks},
            Logs(settings.ranks, settings.log_dir, settings.console, settings.log_mode),
            server,
            settings.start_timeout,
        )
        self._record = Record(self._supervisor)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._supervisor.processes.values()]

    @property
    def alive(self) -> bool:
        return self._record.broken is None and not self._supervisor.dead

    def start(self) -> float:
        """Wait until all ranks have started; returns the moment by which they must have met."""
        deadline = time.monotonic() + self.settings.start_timeout
        self.finish(self.begin("start", None, "start"), deadline)
        return deadline

    def join(self) -> None:
        deadline, wanted = self.start(), self.settings
        mesh = {"config": wanted.config, "backend": wanted.backend, "device": wanted.device, "timeout": wanted.timeout}
        self.finish(self.begin("join", mesh, "init_mesh"), deadline)

    # calls

    def run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        return [message.load() for message in self.call("run", (fn, args, kwargs), _name(fn))]

    def keep(self, key: int, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[float]:
        call = self.begin("keep", (key, fn, args, kwargs), _name(fn))
        if self.finish(call)[0].load():
            yield from self._items(call, _name(fn))

    def drop(self, key: int) -> None:
        """Done with the next command, so that finalizers can call it."""
        self._later.append(("drop", key))

    def stream(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """The items of the stream; ranks compute one item ahead."""
        call = self.begin("open", (fn, args, kwargs), _name(fn))
        self.finish(call)
        yield from self._items(call, _name(fn))

    def _items(self, call: int, label: str) -> Iterator[Any]:
        """The items that the generator of an opened call yields on rank 0."""
        try:
            self.step("next", call, label)
            while (answer := self.finish(call)[0]).kind != "end":
                self.step("next", call, label)
                yield answer.load()
        finally:
            self._later.append(("close", call))

    def call(self, kind: str, value: Any, label: str) -> list[wire.Message]:
        """Send one command to every rank and wait for their answers, by rank; ``label`` names it in errors."""
        return self.finish(self.begin(kind, value, label))

    def begin(self, kind: str, value: Any, label: str) -> int:
        """Send a command to every rank; returns the call's number, for :meth:`step` and :meth:`finish`."""
        self._refuse_if_forked()
        message = wire.pack(kind, 0, value)
        with self._turn:
            self._refuse_if_ended()
            number = self._record.open(label)
            self._send_all(dataclasses.replace(message, call=number))
            return number

    def step(self, kind: str, call: int, label: str) -> None:
        """Send a further command of a call that has begun."""
        self._refuse_if_forked()
        with self._turn:
            self._refuse_if_ended()
            self._record.open(label, call)
            self._send_all(wire.Message(kind, call))

    def finish(self, number: int, deadline: float = math.inf) -> list[wire.Message]:
        """Every rank's next answer to the call, by rank. If the call has failed, raises the failure's error."""
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
        """End the ranks; does nothing in a process forked from their owner."""
        if os.getpid() != self._owner:
            return
        self._record.broken = self._record.broken or _ended(why)
        self._supervisor.end(grace)
        if self._neighbours is None:  # other hosts have yet to read there why
            self._store = None

    def _refuse_if_forked(self) -> None:
        if os.getpid() != self._owner:
            raise UnsupportedError(f"these ranks are process {self._owner}'s: a process forked from it starts its own")

    def _refuse_if_ended(self) -> None:
        if self._record.broken is None and self._supervisor.dead:
            self.end(self._record.obituary(next(iter(self._supervisor.dead)), time.monotonic()).error)
        if self._record.broken is not None:
            self.told = True
            raise self._record.broken.with_traceback(None)

    def _send_all(self, message: wire.Message) -> None:
        while self._later:
            kind, number = self._later.popleft()
            self._send_all(wire.Message(kind, number))
        if message.kind == "close" and message.call in self._record.calls:
            self._record.calls[message.call].abandoned = True
        for rank in self.settings.ranks:
            self._supervisor.send(rank, message, self.settings.timeout)

    # waiting

    def _wait(self, number: int, deadline: float) -> Call:
        """Wait until every rank has finished the call without an error, or the call has a ``failure``."""
        call, interrupted = self._record.calls[number], interrupt.reached_main_thread()
        self._record.listen(0)
        while True:
            wait = self._judge(call, deadline)
            if call.failure is not None or len(call.answers) == len(self.settings.ranks):
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
        """Judge the call, but first any other in which a rank has failed: this one may be waiting for it."""
        until, ask, wake = math.inf, False, False
        others = [each for each in self._record.calls.values() if each.failures and each is not call]
        for each in [*others, call]:
            if each.failure is not None or len(each.answers) == len(self.settings.ranks):
                continue
            verdict = judge(self._record.snapshot(each, deadline if each is call else math.inf), self._patience)
            if isinstance(verdict, Failure):
                self._fail(each, verdict)
            else:
                until, ask, wake = min(until, verdict.until), ask or verdict.ask, wake or verdict.wake
        return Wait(until, ask, wake)

    def _fail(self, call: Call, found: Failure) -> None:
        call.failure = found
        if found.fatal:
            self.end(found.error)

    def _where_it_began(self, first: Failure) -> Failure:
        """This host's failure, which is reported to the others, or the failure on another host that caused it."""
        if self._neighbours is None:
            return first
        if first.kind != failure.OWN and (elsewhere := self._neighbours.await_failure(patience.STORE_CAUSE)):
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
